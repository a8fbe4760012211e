"""Chooses the sizes that images are padded to, and how many of them one program takes."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

BUCKET = 128  # pixels between padded sides
_MAX_SHAPES = 64  # that are compared with each other: more are rounded to larger multiples


class PaddedShape(NamedTuple):
    """Shape of the images that one program takes, without channels."""

    num_images: int
    height: int
    width: int


def bucket(side: int) -> int:
    """Rounds a side up to the next of 129, 257, 385, ... pixels.

    Images of sides up to S need at most ceil((S - 1) / 128)^2 programs: 16 for VOC's 500 pixels.
    """
    return BUCKET * max(1, -(-(side - 1) // BUCKET)) + 1


def plan_shapes(
    sizes: Iterable[tuple[int, int]],
    *,
    multiple: int,
    program_pixels: float,
    max_images: int,
    max_pixels: int,
) -> dict[tuple[int, int], PaddedShape]:
    """Chooses padded shapes for images whose sizes are known, so that few programs are compiled.

    Two shapes are replaced by the smallest one that holds both, as long as the pixels that this
    adds cost less than a program; those that add the fewest pixels first.

    Args:
      sizes: height and width of each image.
      multiple: of which padded sides are, pixels; `BUCKET`: they are those of `bucket`.
      program_pixels: number of pixels whose prediction costs as much as compiling a program.
      max_images: number of images that a program may take, a power of two.
      max_pixels: number of padded pixels that several images in a program may have together.

    Returns:
      The padded shape of each size. The number of images is a power of two, and not more than a
      shape's images need.
    """

    def round_up(side: int) -> int:
        return bucket(side) if multiple == BUCKET else -(-side // multiple) * multiple

    counts = collections.Counter(sizes)
    while True:  # until there are few shapes
        rounded = {size: tuple(map(round_up, size)) for size in counts}
        if multiple >= BUCKET or len(set(rounded.values())) <= _MAX_SHAPES:
            break
        multiple *= 2
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for size, shape in rounded.items():
        groups.setdefault(shape, []).append(size)
    while len(groups) > 1:
        shapes = np.array(list(groups))
        numbers = np.array([sum(counts[size] for size in group) for group in groups.values()])
        joined = np.maximum(shapes[:, None], shapes).prod(-1) * (numbers[:, None] + numbers)
        separate = shapes.prod(-1) * numbers
        added = joined - separate[:, None] - separate + np.diag(np.full(len(shapes), np.inf))
        first, second = np.unravel_index(added.argmin(), added.shape)
        if added[first, second] >= program_pixels:
            break
        members = [size for i in (first, second) for size in groups.pop(tuple(shapes[i].tolist()))]
        shape = tuple(np.maximum(shapes[first], shapes[second]).tolist())
        groups[shape] = groups.get(shape, []) + members
    planned: dict[tuple[int, int], PaddedShape] = {}
    for (height, width), group in groups.items():
        limit = min(max_images, max(1, max_pixels // (height * width)))
        number = sum(counts[size] for size in group)
        num_images = 2 ** min(int(math.log2(limit)), math.ceil(math.log2(number)))
        planned |= dict.fromkeys(group, PaddedShape(num_images, height, width))
    return planned
