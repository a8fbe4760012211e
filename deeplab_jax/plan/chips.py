"""TPU chips with their published figures, and topologies of them."""

from __future__ import annotations

import dataclasses
import math
import re

from deeplab_jax.utils.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip and the slices it comes in. Rates are per second, figures as published."""

    name: str  # in a topology, e.g. "v5e"
    published_hbm: str
    usable_hbm: float  # GiB left to a program, from the compiler's refusals (libtpu 0.0.42.1)
    flops: float  # bfloat16 peak; JAX computes float32 products in bfloat16 too by default
    hbm_bandwidth: float  # bytes
    # Bytes through one port to a neighbour, one way: the published bidirectional bandwidth of a
    # chip, divided by 2 and by its `2 * num_axes` ports.
    link_bandwidth: float
    # Bytes of a chip to other slices, one way (https://jax-ml.github.io/scaling-book/tpus).
    network_bandwidth: float
    num_axes: int  # of a slice
    max_side: int  # chips along an axis
    ring_multiple: int  # an axis is a ring if its number of chips is a multiple of this
    megacore: bool = False  # the chip's two cores are one JAX device

    @property
    def source(self) -> str:
        """The maker's page that publishes the figures."""
        return f"https://docs.cloud.google.com/tpu/docs/{self.name}"

    @property
    def hbm_bytes(self) -> int:
        """Bytes of memory that a program can use."""
        return int(self.usable_hbm * 2**30)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "16 GB", 15.75, 197e12, 819e9, 400e9 / 2 / 4, 3.125e9, 2, 16, 16),
        Chip("v6e", "32 GB", 31.25, 918e12, 1638e9, 800e9 / 2 / 4, 12.5e9, 2, 16, 16),
        # Six links of 50 GB/s: arXiv 2304.01433.
        Chip("v4", "32 GiB", 30.75, 275e12, 1200e9, 50e9, 6.25e9, 3, 64, 4, megacore=True),
        Chip("v5p", "95 GB", 95.74, 459e12, 2765e9, 1200e9 / 2 / 6, 6.25e9, 3, 64, 4),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices of TPU chips."""

    chip: Chip
    shape: tuple[int, ...]  # number of chips along each axis of a slice
    num_slices: int = 1  # joined by the data centre's network

    @property
    def name(self) -> str:
        """Name of one slice, e.g. "v5e:4x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.chips_per_slice * self.num_slices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each axis is a ring: on v5e and v6e an axis of 16; on v4 and v5p all or none."""
        closed = tuple(side % self.chip.ring_multiple == 0 for side in self.shape)
        return closed if len(self.shape) == 2 else (all(closed),) * len(self.shape)

    @property
    def num_ports(self) -> int:
        """Ports in use by a corner chip, which has the fewest: two along a ring, otherwise one."""
        sides = zip(self.shape, self.rings, strict=True)
        return sum(2 if ring else 1 for side, ring in sides if side > 1)

    @property
    def interconnect(self) -> float:
        """Bytes/s that a corner chip can send within its slice."""
        return self.num_ports * self.chip.link_bandwidth


def parse(text: str, num_slices: int = 1) -> Topology:
    """Parses a topology such as "v5e:4x4".

    Raises:
      UserError: there is no such chip, or no slice of that shape.
    """
    if num_slices < 1:
        raise UserError(f"--slices must be 1 or more, got {num_slices}")
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None or match[1] not in CHIPS:
        hint = did_you_mean(match[1] if match else text, CHIPS)
        raise UserError(
            f"--topology must be a chip and the shape of a slice, such as v5e:4x4 or v5p:4x4x4, "
            f"got {text!r}{hint}\nChips: {', '.join(CHIPS)}"
        )
    chip, shape = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    fits = len(shape) == chip.num_axes and all(1 <= side <= chip.max_side for side in shape)
    if not fits or (math.prod(shape) > 1 and any(side % 2 for side in shape[:2])):
        raise UserError(
            f"--topology {text}: a slice of {chip.name} has {chip.num_axes} sides of 1 to "
            f"{chip.max_side} chips, such as {chip.name}:{'x'.join('4' * chip.num_axes)}. The "
            "first two must be even, since a host holds 2x2 chips, or all sides 1"
        )
    return Topology(chip, shape, num_slices)
