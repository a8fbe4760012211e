"""Compiles the paper's training step for several TPU slices, without a TPU, and records the plans.

Each row is one compilation and takes minutes. Rows that are in the file are not compiled again, so
the command can be stopped at any time and resumes when it is run again.

    pip install -e '.[tpu]'
    python benchmarks/plan.py --json benchmarks/results/plan_tpu.json
    python benchmarks/plan.py --json benchmarks/results/plan_tpu.json --tables
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from typing import Any

from deeplab_jax.analysis import descriptions
from deeplab_jax.analysis.summary import markdown_table
from deeplab_jax.config import io as config_io
from deeplab_jax.plan import chips, report
from deeplab_jax.plan.collectives import Collective
from deeplab_jax.plan.plan import make_plan, prepare
from deeplab_jax.utils.files import write_bytes

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "voc_os16.py"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax")


@dataclasses.dataclass(frozen=True)
class Case:
    """A config on a topology: ResNet-101 in bfloat16, by default with crops of 513."""

    topology: str
    batch_size: int
    output_stride: int = 16
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        parts = (self.topology, f"os{self.output_stride}", f"batch{self.batch_size}")
        return " ".join((*parts, *self.settings))

    @property
    def all_settings(self) -> list[str]:
        return [
            "model.dtype=bfloat16",
            f"model.output_stride={self.output_stride}",
            f"train.batch_size={self.batch_size}",
            *self.settings,
        ]


REMAT = ("train.remat=true",)
SHARDED = ("mesh.fully_sharded=true",)

# The most informative first, because a run may be stopped.
CASES = (
    Case("v5e:4x4", 16),
    Case("v5e:4x4", 16, 8),
    Case("v5e:16x16", 256),
    Case("v5e:4x4", 64),
    Case("v5e:4x4", 64, 8),
    Case("v5e:4x4", 64, 16, REMAT),
    Case("v5e:4x4", 64, 8, REMAT),
    Case("v5e:4x4", 64, 16, SHARDED),
    Case("v5e:4x4", 16, 16, ("data.crop_size=1025",)),
    Case("v5e:4x4", 16, 16, ("data.crop_size=1025", "mesh.space=4")),
    Case("v5e:4x4", 128),
    Case("v5e:4x4", 256),
    Case("v5e:4x4", 128, 8),
)
# Slices of v5e for the scaling tables.
SLICES = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
HOP_SECONDS = 1e-6  # https://jax-ml.github.io/scaling-book/sharding, on latency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of the file, compile nothing"
    )
    parser.add_argument(
        "--until",
        type=float,
        default=float("inf"),
        help="start no compilation after this many seconds",
    )
    arguments = parser.parse_args()
    recorded = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"rows": {}}
    if arguments.tables:
        print(cases_table(recorded["rows"]), scaling_tables(recorded["rows"]), sep="\n\n")
        return
    prepare()
    begun = time.monotonic()
    for case in CASES:
        if case.name in recorded["rows"] or arguments.only not in case.name:
            continue
        if time.monotonic() - begun > arguments.until:
            break
        print(case.name, flush=True)
        recorded["rows"][case.name] = record(case)
        recorded["conditions"] = conditions()
        write_bytes(arguments.json, (json.dumps(recorded, indent=1) + "\n").encode())


def record(case: Case) -> dict[str, Any]:
    """Compiles a case and returns its numbers."""
    config = config_io.override(config_io.from_python(CONFIG), case.all_settings)
    architecture = descriptions.of_config(config, str(CONFIG)).architecture
    found = make_plan(config, architecture, chips.parse(case.topology))
    return {"date": time.strftime("%Y-%m-%d"), "settings": case.all_settings} | report.to_json(
        found
    )


def conditions() -> dict[str, Any]:
    """Returns the machine and versions of the compilation times."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


COLUMNS = (
    *("case", "arguments, GiB", "temporaries, GiB", "total, GiB", "of HBM", "TFLOP", "traffic, GB"),
    *("all-reduce, MB", "others, MB", "step, ms", "images/s", "images/s at most", "compiled in"),
)


def cases_table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns a table with one line per case, also for those that are not compiled."""
    lines = [(case.name, *_cells(rows.get(case.name))) for case in CASES]
    return markdown_table(COLUMNS, lines)


def _cells(row: dict[str, Any] | None) -> tuple[str, ...]:
    if row is None:
        return ("not compiled", *[""] * (len(COLUMNS) - 2))
    if row["memory"] is None:
        refused = f"refused: {row['refusal']}"
        return (refused, *[""] * (len(COLUMNS) - 3), f"{row['compile_seconds'] / 60:.0f} min")
    memory, line = row["memory"], row["roofline"]
    moved = {True: 0, False: 0}
    for one in row["collectives"]:
        moved[one["kind"] == "all-reduce"] += one["bytes"]
    fastest = max(line["compute_seconds"], line["interconnect_seconds"])
    return (
        f"{memory['arguments'] / 2**30:.2f}",
        f"{memory['temporaries'] / 2**30:.2f}",
        f"{row['bytes_per_device'] / 2**30:.2f}",
        f"{row['bytes_per_device'] / row['hbm_bytes']:.0%}",
        f"{row['flops_per_device'] / 1e12:.2f}",
        f"{row['accessed_bytes_per_device'] / 1e9:.1f}",
        f"{moved[True] / 1e6:.1f}",
        f"{moved[False] / 1e6:.1f}",
        f"{1e3 * line['step_seconds']:.1f}",
        f"{line['images_per_second']:.0f}",
        f"{row['batch_size'] / fastest:.0f}",
        f"{row['compile_seconds'] / 60:.0f} min",
    )


SCALING_COLUMNS = (
    *("chips", "ports", "GB/s", "all-reduce, ms", "share of the step", "share at most"),
    "latency at least, ms",
)


def scaling_tables(rows: dict[str, dict[str, Any]]) -> str:
    """Estimates the all-reduces of each case compiled on 16 chips for other numbers of chips.

    The batch per chip is constant. The estimate assumes no overlap: the share is t / (t + s), where
    s is the time of the step without communication, either with memory traffic or, for "share at
    most", only its arithmetic.
    """
    tables = []
    for case in CASES:
        row = rows.get(case.name)
        if row is None or row["memory"] is None or row["devices"] != 16 or len(case.settings) > 0:
            continue
        reduced = [one for one in row["collectives"] if one["kind"] == "all-reduce"]
        size = sum(one["bytes"] for one in reduced)
        number = sum(one["count"] for one in reduced)
        line = row["roofline"]
        lines = [_scaling(chips.parse(f"v5e:{shape}"), size, number, line) for shape in SLICES]
        head = f"{case.name}: {number} all-reduces of {size / 1e6:.1f} MB in total"
        tables.append(f"{head}\n\n{markdown_table(SCALING_COLUMNS, lines)}")
    return "\n\n".join(tables)


def _scaling(
    topology: chips.Topology, size: int, number: int, line: dict[str, float]
) -> tuple[str, ...]:
    reduced = Collective("all-reduce", topology.num_chips, 1, size)
    seconds = reduced.sent_bytes / topology.interconnect
    sides = zip(topology.shape, topology.rings, strict=True)
    hops = sum(side // 2 if ring else side - 1 for side, ring in sides)  # to the farthest chip
    step = max(line["memory_seconds"], line["compute_seconds"])
    return (
        f"{topology.num_chips} ({topology.name.partition(':')[2]})",
        str(topology.num_ports),
        f"{topology.interconnect / 1e9:.0f}",
        f"{1e3 * seconds:.2f}",
        f"{seconds / (seconds + step):.1%}",
        f"{seconds / (seconds + line['compute_seconds']):.1%}",
        f"{1e3 * number * hops * HOP_SECONDS:.2f}",
    )


if __name__ == "__main__":
    main()
