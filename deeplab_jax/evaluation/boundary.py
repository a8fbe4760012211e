"""Boundary IoU: the IoU of the pixels near the edges of the classes."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from deeplab_jax.data.labels import IGNORE

DILATION_RATIO = 0.02  # width of a boundary, as a fraction of the image's diagonal

Ids = UInt8[np.ndarray, "h w"]


def mask_boundary(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Selects the pixels of a mask within d pixels of its edge.

    d is 2 % of the image's diagonal, at least 1. These are the pixels that d erosions with a 3x3
    square remove. The image's border is an edge too. Source: Cheng et al. 2021, arXiv 2103.16562,
    section 4, and the authors' code.
    """
    distance = max(1, round(DILATION_RATIO * float(np.hypot(*mask.shape))))
    padded = np.pad(mask.astype(np.uint8), 1)  # with zeros, so that the border erodes
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & (eroded[1:-1, 1:-1] == 0)


def count_boundary(label: Ids, ids: Ids, num_classes: int) -> Int64[np.ndarray, "classes 2"]:
    """Counts the pixels in the intersection and union of true and predicted boundaries, by class.

    Ignored pixels belong to no class, neither in the label nor in the prediction: predictions
    there have no effect, and a perfect prediction scores 1.
    """
    counts = np.zeros((num_classes, 2), np.int64)
    valid = label != IGNORE
    for index in np.union1d(label[valid], ids[valid]):
        true = mask_boundary(label == index)
        predicted = mask_boundary((ids == index) & valid)
        counts[index] = np.sum(true & predicted), np.sum(true | predicted)
    return counts


def boundary_iou(counts: Int64[np.ndarray, "classes 2"]) -> Float[np.ndarray, " classes"]:
    """Computes the boundary IoU by class from summed counts; NaN for classes that do not occur."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts[:, 0] / counts[:, 1].astype(np.float64)
