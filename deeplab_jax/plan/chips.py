"""TPU chips by their published figures, and slices of them."""

from __future__ import annotations

import dataclasses
import math
import re

from deeplab_jax.utils.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      name: as a topology spells it.
      source: page of its maker's that publishes the figures; `link_bandwidth` is what it gives for
        the whole chip, both ways, divided by two and by `2 * max_axes` ports.
      published_hbm: memory of a chip as published.
      hbm_bytes: what the compiler lets a program have of it: its own words when it refuses
        (libtpu 0.0.42.1).
      flops: peak of a chip in bfloat16, FLOP/s. Products of float32 run in it too unless JAX is
        asked for more precision.
      hbm_bandwidth: of a chip, bytes/s.
      link_bandwidth: of a port to a neighbour, bytes/s one way.
      network_bandwidth: of a chip to other slices, bytes/s one way
        (https://jax-ml.github.io/scaling-book/tpus).
      axes: how many a slice has.
      max_side: chips along an axis, at most.
      ring: an axis closes to a ring if its side is divisible by this.
      options: what the compiler is told so that a chip is one device, as it is in JAX.
    """

    name: str
    source: str
    published_hbm: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    axes: int
    max_side: int
    ring: int
    options: tuple[tuple[str, str], ...] = ()


_PAGES = "https://docs.cloud.google.com/tpu/docs/"
_GIB = 2**30

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            source=_PAGES + "v5e",
            published_hbm="16 GB",
            hbm_bytes=int(15.75 * _GIB),
            flops=197e12,
            hbm_bandwidth=819e9,
            link_bandwidth=400e9 / 2 / 4,
            network_bandwidth=3.125e9,
            axes=2,
            max_side=16,
            ring=16,
        ),
        Chip(
            name="v6e",
            source=_PAGES + "v6e",
            published_hbm="32 GB",
            hbm_bytes=int(31.25 * _GIB),
            flops=918e12,
            hbm_bandwidth=1638e9,
            link_bandwidth=800e9 / 2 / 4,
            network_bandwidth=12.5e9,
            axes=2,
            max_side=16,
            ring=16,
        ),
        Chip(
            name="v4",
            source=_PAGES + "v4",  # the ports: arXiv 2304.01433, six of 50 GB/s
            published_hbm="32 GiB",
            hbm_bytes=int(30.75 * _GIB),
            flops=275e12,
            hbm_bandwidth=1200e9,
            link_bandwidth=50e9,
            network_bandwidth=6.25e9,
            axes=3,
            max_side=64,
            ring=4,
            options=(("chip_config_name", "megacore"),),
        ),
        Chip(
            name="v5p",
            source=_PAGES + "v5p",
            published_hbm="95 GB",
            hbm_bytes=int(95.74 * _GIB),
            flops=459e12,
            hbm_bandwidth=2765e9,
            link_bandwidth=1200e9 / 2 / 6,
            network_bandwidth=6.25e9,
            axes=3,
            max_side=64,
            ring=4,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of TPU chips.

    Attributes:
      chip: of which all are.
      shape: chips along each axis of a slice.
      slices: how many there are, joined by the network of the data centre.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As in "v5e:4x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        return self.chips_per_slice * self.slices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which axes close to a ring: on v5e and v6e one of 16; on v4 and v5p all, or none."""
        closed = tuple(side % self.chip.ring == 0 for side in self.shape)
        return closed if len(self.shape) == 2 else (all(closed),) * len(self.shape)

    @property
    def ports(self) -> int:
        """In use at a corner of a slice, where there are fewest: two along a ring, else one."""
        sides = zip(self.shape, self.rings, strict=True)
        return sum(2 if ring else 1 for side, ring in sides if side > 1)

    @property
    def interconnect(self) -> float:
        """Bytes/s that each chip can send within its slice."""
        return self.ports * self.chip.link_bandwidth


def parse(text: str, slices: int = 1) -> Topology:
    """The topology that a text such as "v5e:4x4" names.

    Raises:
      UserError: there is no such chip, or no slice of that shape.
    """
    if slices < 1:
        raise UserError(f"--slices must be 1 or more, got {slices}")
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None or match[1] not in CHIPS:
        hint = did_you_mean(match[1] if match else text.split(":")[0], CHIPS)
        raise UserError(
            f"--topology must be a chip and the shape of a slice, such as v5e:4x4 or v5p:4x4x4, "
            f"got {text!r}{hint}\nChips: {', '.join(CHIPS)}"
        )
    chip, shape = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    if len(shape) != chip.axes or not all(1 <= side <= chip.max_side for side in shape):
        raise UserError(
            f"--topology {text}: a slice of {chip.name} has {chip.axes} sides of 1 to "
            f"{chip.max_side} chips, as {chip.name}:{'x'.join('4' * chip.axes)}"
        )
    if shape != (1,) * len(shape) and any(side % 2 for side in shape[:2]):
        raise UserError(
            f"--topology {text}: hosts hold 2x2 chips, so the first two sides must be even "
            "(or all 1)"
        )
    return Topology(chip, shape, slices)
