"""Confusion matrices and boundaries, and the scores and intervals computed from them."""

from __future__ import annotations

import dataclasses
import warnings
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int64, Integer, UInt8

from deeplab_jax.data.labels import IGNORE

DILATION_RATIO = 0.02  # width of a boundary, as a fraction of the image's diagonal


def confusion_matrices(
    labels: UInt8[Array, "n h w"], ids: Integer[Array, "n h w"], num_classes: int
) -> Int[Array, "n classes classes"]:
    """Counts the pixels of each image by (true class, predicted class), as int32.

    Ignored pixels are not counted. The counts are an integer product of one-hot matrices: exact,
    independent of the order of summation, and without a scatter, which is slow on accelerators.
    """
    classes = jnp.arange(num_classes, dtype=jnp.int32)

    def one_image(label: Array, prediction: Array) -> Array:
        # An ignored pixel has no class, so its row of the one-hot matrix is zero.
        true = (label.reshape(-1, 1).astype(jnp.int32) == classes).astype(jnp.int8)
        predicted = (prediction.reshape(-1, 1).astype(jnp.int32) == classes).astype(jnp.int8)
        return lax.dot_general(
            true, predicted, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )

    return jax.vmap(one_image)(labels, ids)


def confusion_matrix(
    label: UInt8[np.ndarray, "h w"], ids: Integer[np.ndarray, "h w"], num_classes: int
) -> Int64[np.ndarray, "classes classes"]:
    """Computes the confusion matrix of one image on the host; see `confusion_matrices`."""
    valid = label < num_classes
    pairs = label[valid].astype(np.int64) * num_classes + ids[valid]
    matrix = np.bincount(pairs, minlength=num_classes**2)
    return matrix.astype(np.int64).reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix, 0..1; NaN where a class has no pixels or there are none at all.

    Attributes:
      miou, mean_accuracy: means of `per_class_iou` and `per_class_accuracy` over the classes that
        have one.
      miou_without_background: NaN if there is no background class.
      pixel_accuracy: fraction of the valid pixels that are predicted correctly.
      frequency_weighted_iou: mean of `per_class_iou`, weighted by `per_class_true_share`.
      per_class_iou: true positives over the union of true and predicted pixels. NaN for a class
        that is neither labelled nor predicted.
      per_class_accuracy: fraction of the class's labelled pixels that are predicted correctly.
      per_class_true_share, per_class_predicted_share: fraction of the valid pixels that are
        labelled, or predicted, as the class.
    """

    miou: float
    miou_without_background: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    per_class_iou: np.ndarray
    per_class_accuracy: np.ndarray
    per_class_true_share: np.ndarray
    per_class_predicted_share: np.ndarray


def scores(matrix: Integer[np.ndarray, "classes classes"], background: int | None = None) -> Scores:
    """Computes the scores of a confusion matrix, whose rows are the true classes.

    Source: VOC 2012 development kit, section "segmentation accuracy" and `VOCevalseg.m`: IoU of a
    class over all images together. Frequency-weighted IoU: Long et al. 2015, arXiv 1411.4038,
    section 5. `background` is the id of the background class, if there is one.
    """
    counts = np.asarray(matrix, np.float64)
    right, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    total = counts.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = right / (true + predicted - right)
        recall = right / true
        accuracy = right.sum() / total
        true_share, predicted_share = true / total, predicted / total
    foreground = iou[:0] if background is None else np.delete(iou, background)
    labelled = true > 0  # other classes have weight 0, and may have no IoU
    weighted = (true_share[labelled] * iou[labelled]).sum() if total else np.nan
    return Scores(
        per_class_iou=iou,
        per_class_accuracy=recall,
        per_class_true_share=true_share,
        per_class_predicted_share=predicted_share,
        miou=nan_mean(iou),
        miou_without_background=nan_mean(foreground),
        pixel_accuracy=float(accuracy),
        mean_accuracy=nan_mean(recall),
        frequency_weighted_iou=float(weighted),
    )


class ClassScores(NamedTuple):
    """Scores of one class against the rest, 0..1; NaN where a denominator is 0.

    They are of the pixels that are predicted, or labelled, as the class; `f1` is also Dice.
    """

    precision: float
    recall: float
    f1: float
    iou: float


def class_scores(matrix: Integer[np.ndarray, "classes classes"], index: int) -> ClassScores:
    """Computes the scores of the class `index` against the rest; see `scores`."""
    right = np.float64(matrix[index, index])
    true, predicted = matrix[index].sum(), matrix[:, index].sum()
    with np.errstate(invalid="ignore"):
        fractions = (
            right / predicted,
            right / true,
            2 * right / (true + predicted),
            right / (true + predicted - right),
        )
    return ClassScores(*map(float, fractions))


def nan_mean(values: np.ndarray) -> float:
    """Computes the mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def bootstrap_miou(
    matrices: Integer[np.ndarray, "images classes classes"],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Computes the ends of a confidence interval of the mIoU by drawing images with replacement.

    The interval, which holds the fraction `level` of the resamples' mIoUs, shows how much the score
    depends on which images are in the split. It does not show how much it varies between training
    runs. NaN if no pixel is valid. Source: Efron and Tibshirani 1993, chapter 13, the percentile
    interval.
    """
    counts = matrices.astype(np.float64)  # exact: there are far fewer than 2^53 pixels
    right = np.diagonal(counts, axis1=1, axis2=2)
    union = counts.sum(1) + counts.sum(2) - right
    num_images = len(counts)
    # How often each resample contains each image.
    times = np.random.default_rng(seed).multinomial(
        num_images, np.full(num_images, 1 / num_images), num_resamples
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0, and means of only NaNs
        miou = np.nanmean((times @ right) / (times @ union), axis=1)
        low, high = np.nanquantile(miou, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- Boundaries --------------------------------------------------------------------------------


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


def count_boundary(
    label: UInt8[np.ndarray, "h w"], ids: UInt8[np.ndarray, "h w"], num_classes: int
) -> Int64[np.ndarray, "classes 2"]:
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
