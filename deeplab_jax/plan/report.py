"""Formats a plan as tables and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from deeplab_jax.plan.plan import Plan

COLLECTIVE_COLUMNS = ("collective", "devices", "a step", "MB a step", "MB sent a chip")


def to_json(plan: Plan) -> dict[str, Any]:
    """Returns all numbers of a plan; those that a refused program does not have are null."""
    topology, chip, memory = plan.topology, plan.topology.chip, plan.memory
    return {
        "topology": topology.name,
        "slices": topology.num_slices,
        "devices": topology.num_chips,
        "mesh": dict(zip(("data", "space"), plan.mesh, strict=True)),
        "batch_size": plan.batch_size,
        "fits": plan.fits,
        "refusal": plan.refusal or None,
        "bytes_per_device": memory.total if memory else None,
        "memory": dataclasses.asdict(memory) if memory else None,
        "hbm_bytes": plan.hbm_bytes,
        "flops_per_device": plan.flops if memory else None,
        "convolution_flops_per_device": plan.convolution_flops,
        "accessed_bytes_per_device": plan.accessed_bytes if memory else None,
        "collectives": [
            dataclasses.asdict(one) | {"sent_bytes": one.sent_bytes} for one in plan.collectives
        ],
        "unknown_loops": plan.unknown_loops,
        "peaks": {
            "flops": chip.flops,
            "hbm_bandwidth": chip.hbm_bandwidth,
            "interconnect_bandwidth": topology.interconnect,
            "ports": topology.num_ports,
            "network_bandwidth": chip.network_bandwidth,
            "source": chip.source,
        },
        "roofline": roofline(plan) if memory else None,
        "compile_seconds": plan.compile_seconds,
    }


def roofline(plan: Plan) -> dict[str, Any]:
    """Returns lower bounds of a step's time, from the published peaks of the chip.

    The FLOPs and bytes are those that XLA counts. Bytes that stay in the chip's fast memory are
    counted too, so a step may take less than its memory's time. A chip sends through the ports of
    a corner chip, which has the fewest, and through the network between slices.
    """
    topology, chip = plan.topology, plan.topology.chip
    within = sum(one.sent_bytes for one in plan.collectives if not one.between_slices)
    between = sum(one.sent_bytes for one in plan.collectives if one.between_slices)
    seconds = {
        "compute": plan.flops / chip.flops,
        "memory": plan.accessed_bytes / chip.hbm_bandwidth,
        "interconnect": between / chip.network_bandwidth
        + (within / topology.interconnect if topology.num_ports else 0.0),
    }
    slowest = max(seconds, key=seconds.__getitem__)
    return {
        **{f"{name}_seconds": value for name, value in seconds.items()},
        # If no traffic reaches the HBM: a bound for this arithmetic.
        "fastest_step_seconds": max(seconds["compute"], seconds["interconnect"]),
        # If all three overlap, and all traffic reaches the HBM.
        "step_seconds": seconds[slowest],
        "images_per_second": _images_per_second(plan, seconds[slowest]),
        "bound_by": slowest,
    }


def _images_per_second(plan: Plan, step_seconds: float) -> float | None:
    """Returns the images that steps of this time process, or None if a step takes no time."""
    return plan.batch_size / step_seconds if step_seconds else None


def summary_rows(plan: Plan) -> list[tuple[str, str]]:
    """Returns names and values that describe a plan, one pair per line."""
    topology, chip = plan.topology, plan.topology.chip
    slices = f" in {topology.num_slices} slices" if topology.num_slices > 1 else ""
    rows = [
        ("devices", f"{topology.num_chips} x {chip.name}, {topology.name}{slices}"),
        ("mesh", f"data {plan.mesh[0]} x space {plan.mesh[1]}"),
        ("batch", f"{plan.batch_size}, {plan.batch_size / topology.num_chips:g} a chip"),
        ("compiled in", f"{plan.compile_seconds:.0f} s"),
    ]
    if plan.memory is None:
        return [*rows, ("does not fit", f"the compiler says: {plan.refusal}")]
    bounds = {name.removesuffix("_seconds"): value for name, value in roofline(plan).items()}
    total = plan.memory.total
    memory = dataclasses.asdict(plan.memory) | {"total": total}
    return [
        *rows,
        *((f"memory a chip: {name}", f"{_size(value):>10}") for name, value in memory.items()),
        (
            "memory a chip: limit",
            f"{_size(plan.hbm_bytes):>10} of {chip.published_hbm} are left to programs: "
            f"{'fits' if plan.fits else 'does not fit'}, {100 * total / plan.hbm_bytes:.0f} % used",
        ),
        (
            "arithmetic a chip",
            f"{plan.convolution_flops / 1e9:.4g} GFLOP of convolutions, forward and backward; "
            f"{plan.flops / 1e9:.4g} by XLA's count of the program",
        ),
        ("memory traffic", f"{plan.accessed_bytes / 1e9:.2f} GB by XLA's count"),
        (
            "time at the peaks",
            f"arithmetic {_ms(bounds['compute'])} at {chip.flops / 1e12:g} TFLOP/s, memory "
            f"{_ms(bounds['memory'])} at {chip.hbm_bandwidth / 1e9:g} GB/s, interconnect "
            f"{_ms(bounds['interconnect'])} at {topology.interconnect / 1e9:g} GB/s "
            f"({topology.num_ports} ports)",
        ),
        (
            "a step, estimated",
            f"{_ms(bounds['step'])}, bound by {bounds['bound_by']}: "
            f"{bounds['images_per_second'] or math.inf:.0f} images/s; at most "
            f"{_images_per_second(plan, bounds['fastest_step']) or math.inf:.0f} if all memory "
            "traffic stayed in the chips",
        ),
        ("", f"(from published peaks, all three overlapped; not a measurement. {chip.source})"),
    ]


def collective_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Returns one row per kind and group size of collectives, under `COLLECTIVE_COLUMNS`."""
    return [
        (
            one.kind + (" between slices" if one.between_slices else ""),
            str(one.group_size),
            str(one.count),
            f"{one.bytes / 1e6:.3f}",
            f"{one.sent_bytes / 1e6:.3f}",
        )
        for one in plan.collectives
    ]


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
