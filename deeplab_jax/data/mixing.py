"""Mixing of two training crops: pixels of a second crop are pasted onto the first.

A function of `MASKS` chooses the pixels from the second crop's label. Only valid pixels are pasted,
so a crop never loses one by mixing.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import UInt8

from deeplab_jax.data.labels import IGNORE, LabelSet, class_counts, is_background

Label = UInt8[np.ndarray, "h w"]
Mask = UInt8[np.ndarray, "h w"]  # 0 where the first crop stays
Crop = tuple[UInt8[np.ndarray, "h w c"], Label]
Choose = Callable[[Label, np.random.Generator, LabelSet], Mask]


def paste(crop: Crop, other: Crop, mask: Mask) -> None:
    """Copies the pixels of a mask that are valid in `other` to `crop`, image and label."""
    mask = mask * (other[1] != IGNORE)
    for target, source in zip(crop, other, strict=True):
        cv2.copyTo(source, mask, target)


def cutmix(label: Label, rng: np.random.Generator, labels: LabelSet) -> Mask:
    """Chooses a rectangle of half the crop's area, of random proportions, at a random place.

    The logarithm of its relative height is uniform in log(1/2)..0.

    Source: Yun et al. 2019, arXiv 1905.04899; the rectangle is that of French et al. 2020,
    arXiv 1906.01916, section 3.3, for segmentation.
    """
    del labels
    draws = rng.random(3)
    height = 0.5 ** draws[0]
    parts = (height, 0.5 / height)
    sides = [round(part * side) for part, side in zip(parts, label.shape, strict=True)]
    top, left = (
        int(draw * (whole - side + 1))
        for draw, whole, side in zip(draws[1:], label.shape, sides, strict=True)
    )
    mask = np.zeros_like(label)
    mask[top : top + sides[0], left : left + sides[1]] = 255
    return mask


def classmix(label: Label, rng: np.random.Generator, labels: LabelSet) -> Mask:
    """Chooses the pixels of half of the label's classes, rounded down.

    Source: Olsson et al. 2021, arXiv 2007.07936, algorithm 1.
    """
    present = np.flatnonzero(class_counts(label, labels.num_classes))
    order = np.argsort(rng.random(labels.num_classes)[present])
    table = np.zeros(256, np.uint8)
    table[present[order[: len(present) // 2]]] = 255
    return cv2.LUT(label, table)


def copy_paste(label: Label, rng: np.random.Generator, labels: LabelSet) -> Mask:
    """Chooses each object with probability 1/2.

    An object is a connected region (of 8 neighbours) of one class, other than background.

    Source: Ghiasi et al. 2021, arXiv 2012.07177: a random subset of the objects, without blending
    of their edges. Its objects are those of an instance segmentation.
    """
    mask = np.zeros_like(label)
    for index in np.flatnonzero(class_counts(label, labels.num_classes)):
        if not is_background(labels.names[index]):
            count, regions = cv2.connectedComponents((label == index).view(np.uint8))
            chosen = np.where(rng.random(count) < 0.5, 255, 0).astype(np.uint8)
            chosen[0] = 0  # the pixels of other classes
            mask |= chosen[regions]
    return mask


MASKS: dict[str, Choose] = {"cutmix": cutmix, "classmix": classmix, "copy_paste": copy_paste}
