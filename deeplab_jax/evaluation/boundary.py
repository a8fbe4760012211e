"""Boundary IoU: how well the edges of the classes are met."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from deeplab_jax.data.labels import IGNORE

DILATION_RATIO = 0.02  # of the image's diagonal: how far a boundary reaches inwards

Ids = UInt8[np.ndarray, "h w"]


def boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels of a mask within d pixels of its edge, d = 2 % of the image's diagonal, at least 1.

    The mask less what is left of it after d erosions with a 3x3 square. The image's border is an
    edge too. Source: Cheng et al. 2021, arXiv 2103.16562, section 4, and the authors' code.
    """
    distance = max(1, round(DILATION_RATIO * float(np.hypot(*mask.shape))))
    padded = np.pad(mask.astype(np.uint8), 1)  # zeros around: the border erodes
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & (eroded[1:-1, 1:-1] == 0)


def count_boundary(label: Ids, ids: Ids, num_classes: int) -> Int64[np.ndarray, "classes 2"]:
    """Pixels in the intersection and in the union of true and predicted boundaries, by class.

    Ignored pixels belong to no class, neither in the label nor in the prediction, so that what
    is predicted there changes nothing and a perfect prediction scores 1.
    """
    counts = np.zeros((num_classes, 2), np.int64)
    valid = label != IGNORE
    for index in np.union1d(label[valid], ids[valid]):
        true = boundary(label == index)
        predicted = boundary((ids == index) & valid)
        counts[index] = np.sum(true & predicted), np.sum(true | predicted)
    return counts


def boundary_iou(counts: Int64[np.ndarray, "classes 2"]) -> Float[np.ndarray, " classes"]:
    """Boundary IoU by class of counts summed over images; NaN where a class occurs nowhere."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts[:, 0] / counts[:, 1].astype(np.float64)
