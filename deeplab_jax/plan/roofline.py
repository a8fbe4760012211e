"""Lower bounds of a step's time, from the published peaks of the chip."""

from __future__ import annotations

import dataclasses

from deeplab_jax.plan.plan import Plan


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at the peak of each resource of a chip.

    Attributes:
      compute: the FLOPs that XLA counts, at the bfloat16 peak.
      memory: the bytes that XLA counts, at the HBM bandwidth. Bytes that stay in the chip's fast
        memory are counted too, so a step may take less.
      interconnect: the bytes a chip sends, through the ports of a corner chip, which has the
        fewest, and through the network between slices.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def fastest(self) -> float:
        """Seconds of a step if no traffic reaches the HBM: a bound for this arithmetic."""
        return max(self.compute, self.interconnect)

    @property
    def step(self) -> float:
        """Seconds of a step if all three overlap, and all traffic reaches the HBM."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound_by(self) -> str:
        """Name of the resource that takes longest."""
        return max(dataclasses.asdict(self).items(), key=lambda part: part[1])[0]


def roofline(plan: Plan) -> Roofline:
    """Returns the bounds for a plan that was compiled."""
    topology, chip = plan.topology, plan.topology.chip
    within = sum(one.sent_bytes for one in plan.collectives if not one.between_slices)
    between = sum(one.sent_bytes for one in plan.collectives if one.between_slices)
    return Roofline(
        compute=plan.flops / chip.flops,
        memory=plan.accessed_bytes / chip.hbm_bandwidth,
        interconnect=between / chip.network_bandwidth
        + (within / topology.interconnect if topology.num_ports else 0.0),
    )
