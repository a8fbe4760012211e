"""Integer confusion matrices, and the scores that follow from them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int64, Integer, UInt8

_RESAMPLES_AT_ONCE = 100  # bounds the memory of the bootstrap


def confusion_matrices(
    labels: UInt8[Array, "n h w"], ids: Integer[Array, "n h w"], num_classes: int
) -> Int[Array, "n classes classes"]:
    """Counts of pixels by (true class, predicted class) of each image, int32.

    Ignored pixels count nowhere. A product of one-hot matrices in integers: exact, the same in any
    order of summation, and no scatter, which accelerators do slowly.
    """
    classes = jnp.arange(num_classes, dtype=jnp.int32)

    def one_image(label: Array, prediction: Array) -> Array:
        # An ignored pixel has no class, so its row of the one-hot matrix is empty.
        true = (label.reshape(-1, 1).astype(jnp.int32) == classes).astype(jnp.int8)
        predicted = (prediction.reshape(-1, 1).astype(jnp.int32) == classes).astype(jnp.int8)
        return lax.dot_general(
            true, predicted, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )

    return jax.vmap(one_image)(labels, ids)


def count(
    label: UInt8[np.ndarray, "h w"], ids: Integer[np.ndarray, "h w"], num_classes: int
) -> Int64[np.ndarray, "classes classes"]:
    """The confusion matrix of one image of any size, on the host; see `confusion_matrices`."""
    valid = label < num_classes
    pairs = label[valid].astype(np.int64) * num_classes + ids[valid]
    matrix = np.bincount(pairs, minlength=num_classes**2)
    return matrix.astype(np.int64).reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix, shares in 0..1; NaN where a class, or everything, is absent.

    Attributes:
      per_class_iou: true positives over the union of true and predicted pixels, by class. A class
        that occurs neither in labels nor in predictions has none.
      per_class_accuracy: share of the class's pixels that are right, by class; NaN where the
        labels hold none.
      true_share: share of the valid pixels that the labels give to each class.
      predicted_share: share of the valid pixels that the predictions give to each class.
      miou: mean over the classes that have an IoU.
      miou_without_background: the same without the class that is the ground; NaN if there is none.
      pixel_accuracy: share of valid pixels that are right.
      mean_accuracy: mean over the classes that occur of the share of their pixels that are right.
      frequency_weighted_iou: mean of the classes' IoU, weighted by their share of the labels.
    """

    per_class_iou: np.ndarray
    per_class_accuracy: np.ndarray
    true_share: np.ndarray
    predicted_share: np.ndarray
    miou: float
    miou_without_background: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float


def scores(matrix: Integer[np.ndarray, "classes classes"], background: int | None = None) -> Scores:
    """Scores of an integer confusion matrix, whose rows are the true classes.

    Source: VOC 2012 development kit, section "segmentation accuracy" and `VOCevalseg.m`: IoU of a
    class over all images together. Frequency-weighted IoU: Long et al. 2015, arXiv 1411.4038,
    section 5.

    Args:
      matrix: counts of pixels.
      background: id of the class that is the ground, if one is.
    """
    counts = np.asarray(matrix, np.float64)
    right, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    total = counts.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = right / (true + predicted - right)
        recall = right / true
        accuracy = right.sum() / total
        true_share, predicted_share = true / total, predicted / total
    things = np.delete(iou, [] if background is None else [background])
    return Scores(
        per_class_iou=iou,
        per_class_accuracy=recall,
        true_share=true_share,
        predicted_share=predicted_share,
        miou=nan_mean(iou),
        miou_without_background=float("nan") if background is None else nan_mean(things),
        pixel_accuracy=float(accuracy),
        mean_accuracy=nan_mean(recall),
        # A class without pixels has no weight, and may have no IoU.
        frequency_weighted_iou=float((true_share[true > 0] * iou[true > 0]).sum())
        if total
        else float("nan"),
    )


def nan_mean(values: np.ndarray) -> float:
    """Mean of the entries that are not NaN, NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def bootstrap_miou(
    matrices: Integer[np.ndarray, "images classes classes"],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of the mIoU, by drawing as many images anew, with replacement.

    It tells how much the score owes to which images happened to be in the split; not how much
    it would change with another training. Source: Efron and Tibshirani 1993, chapter 13, the
    percentile interval.

    Args:
      matrices: confusion matrix of each image.
      resamples: sets of images that are drawn.
      level: share of their mIoU that the interval holds.
      seed: of the draws.

    Returns:
      Lower and upper end; NaN where no pixel counts.
    """
    draws = _bootstrap_draws(matrices, resamples, seed)
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _bootstrap_draws(matrices: np.ndarray, resamples: int, seed: int) -> Float[np.ndarray, " r"]:
    """The mIoU of each resample."""
    counts = matrices.astype(np.float64)  # exact: pixels are far fewer than 2^53
    right = np.diagonal(counts, axis1=1, axis2=2)
    union = counts.sum(1) + counts.sum(2) - right
    generator = np.random.default_rng(seed)
    draws = []
    for first in range(0, resamples, _RESAMPLES_AT_ONCE):
        rows = min(_RESAMPLES_AT_ONCE, resamples - first)
        # How often each image is drawn.
        times = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), rows)
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = (times @ right) / (times @ union)
        known = ~np.isnan(iou)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws.append(np.where(known, iou, 0).sum(1) / known.sum(1))
    return np.concatenate(draws)
