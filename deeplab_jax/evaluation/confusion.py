"""The integer confusion matrix, and the scores that follow from it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Integer, UInt8


def confusion_matrix(
    labels: UInt8[Array, "n h w"], ids: Integer[Array, "n h w"], num_classes: int
) -> Int[Array, "classes classes"]:
    """Counts of pixels by (true class, predicted class), int32; ignored pixels count nowhere.

    A product of one-hot matrices in integers: exact, the same in any order of summation, and no
    scatter, which accelerators do slowly.
    """
    classes = jnp.arange(num_classes, dtype=jnp.int32)

    def one_image(counts: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        label, prediction = (x.reshape(-1).astype(jnp.int32) for x in pair)
        # An ignored pixel has no class, so its row of the one-hot matrix is empty.
        true = (label[:, None] == classes).astype(jnp.int8)
        predicted = (prediction[:, None] == classes).astype(jnp.int8)
        product = lax.dot_general(
            true, predicted, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )
        return counts + product, None

    zeros = jnp.zeros((num_classes, num_classes), jnp.int32)
    return lax.scan(one_image, zeros, (labels, ids))[0]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix; NaN where a class, or everything, is absent.

    Attributes:
      per_class_iou: true positives over the union of true and predicted pixels, by class. A class
        that occurs neither in labels nor in predictions has none.
      miou: mean over the classes that have one.
      pixel_accuracy: share of valid pixels that are right.
      mean_accuracy: mean over the classes that occur of the share of their pixels that are right.
    """

    per_class_iou: np.ndarray
    miou: float
    pixel_accuracy: float
    mean_accuracy: float


def scores(matrix: np.ndarray) -> Scores:
    """Scores of an integer confusion matrix `[classes, classes]`, rows are the true classes.

    Source: VOC 2012 development kit, section "segmentation accuracy": IoU of a class over all
    images together.
    """
    counts = np.asarray(matrix, np.float64)
    right, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    union = true + predicted - right
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = right / union
        recall = right / true
        accuracy = right.sum() / counts.sum()
    return Scores(iou, nan_mean(iou), float(accuracy), nan_mean(recall))


def nan_mean(values: np.ndarray) -> float:
    """Mean of the entries that are not NaN, NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
