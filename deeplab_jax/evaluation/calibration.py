"""Calibrates a model on a split: temperatures, calibration errors, and the rule for unsure pixels.

Half of the images fit the temperatures. The other half measures them and sets the rule, so that its
images are exchangeable with new ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer
from scipy.optimize import brentq

from deeplab_jax.data.dataset import Dataset, read_example
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.inference.calibration import FORMAT, TINY, Calibration, temper, views_of
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.utils.errors import UserError

BINS = 15  # of a probability, of equal width
MIN_IMAGES = 10  # with pixels that a temperature is fitted to
TEMPERATURES = (0.05, 20.0)  # smallest and largest
SEED = 0  # of the halves and of the sampled pixels
_MAX_VALUES = 1 << 22  # logits of the sampled pixels

# Thresholds of the rule: 0 (no pixel is unsure), 2 (all are), and between them steps of 0.01 of the
# log-odds: finest near 1, where trained models put most pixels.
_LOG_ODDS = np.linspace(-8, 16, 2401)
THRESHOLDS = np.unique(np.array([0, *1 / (1 + np.exp(-_LOG_ODDS)), 2], np.float32))


def fit_temperature(
    logits: Float[np.ndarray, "n classes"],
    labels: Integer[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"] | None = None,
) -> float:
    """Finds the temperature T that minimizes the negative log-likelihood of `softmax(logits / T)`.

    It is convex in 1 / T: Brent's method finds the zero of its derivative. Sums are float64.
    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.

    Returns:
      T, or the end of `TEMPERATURES` nearest to it.
    """
    z = logits - logits.max(axis=1, keepdims=True).astype(np.float64)
    true = z[np.arange(len(z)), labels]
    weights = np.ones(len(z)) if weights is None else weights

    def slope(inverse: float) -> float:
        p = np.exp(inverse * z)
        return float(weights @ ((p * z).sum(axis=1) / p.sum(axis=1) - true))

    low, high = (1 / end for end in reversed(TEMPERATURES))
    if slope(low) >= 0:
        return TEMPERATURES[1]
    if slope(high) <= 0:
        return TEMPERATURES[0]
    return 1 / float(brentq(slope, low, high, rtol=1e-8))


def checked_temperature(
    logits: Float[np.ndarray, "n classes"],
    labels: Integer[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    images: Integer[np.ndarray, " n"],
    fallback: float,
) -> float:
    """Returns the temperature of pixels, or the fallback if the data do not support another.

    They do if there are `MIN_IMAGES` images, the temperature of each half of them has a higher
    likelihood on the other half than the fallback has, and it is within `TEMPERATURES`.
    `images` is the number of each pixel's image.
    """
    present = np.unique(images)
    if len(present) < MIN_IMAGES:
        return fallback

    def loss(rows: np.ndarray, temperature: float) -> float:
        p = temper(np.exp(logits[rows].astype(np.float64)), temperature)
        return -float(weights[rows] @ np.log(p[np.arange(len(p)), labels[rows]] + TINY))

    for start in range(2):
        half = np.isin(images, present[start::2])
        fitted = fit_temperature(logits[half], labels[half], weights[half])
        if loss(~half, fitted) >= loss(~half, fallback):
            return fallback
    fitted = fit_temperature(logits, labels, weights)
    return fallback if fitted in TEMPERATURES else fitted


class Reliability:
    """Sums over pixels, from which the calibration errors follow.

    Attributes:
      top: by bin of the predicted class's probability, float64 `[3, 1, BINS]`: number of pixels,
        sum of the probability, number of correct pixels.
      by_class: the same of each class's probability, where correct means labelled, `[3, classes,
        BINS]`.
    """

    def __init__(self, num_classes: int) -> None:
        self.pixels = 0
        self.top, self.by_class = np.zeros((3, 1, BINS)), np.zeros((3, num_classes, BINS))
        self._squares = self._log_likelihood = 0.0

    def add(
        self, probabilities: Float[np.ndarray, "n classes"], labels: Integer[np.ndarray, " n"]
    ) -> None:
        """Adds pixels, without those that are ignored."""
        is_true = labels[:, None] == np.arange(probabilities.shape[1])
        true = probabilities[is_true].astype(np.float64)
        is_right = probabilities.argmax(axis=1) == labels
        self.pixels += len(labels)
        self._squares += float(np.square(probabilities - is_true).sum(dtype=np.float64))
        self._log_likelihood += float(np.log(np.maximum(true, TINY)).sum())
        self.top += _count(probabilities.max(axis=1)[:, None], is_right[:, None])
        self.by_class += _count(probabilities, is_true)

    def numbers(self) -> dict[str, float]:
        """Returns the expected and the static calibration error, the Brier score and the NLL.

        ECE is arXiv 1706.04599, equation 3; SCE, its mean over the probabilities of all classes,
        arXiv 1904.01685.
        """
        top, static = (np.abs(x[2] - x[1]).sum() for x in (self.top, self.by_class))
        return {
            "ece": float(top) / self.pixels,
            "sce": float(static) / self.pixels / self.by_class.shape[1],
            "brier": self._squares / self.pixels,
            "nll": -self._log_likelihood / self.pixels,
        }


def _count(values: Float[np.ndarray, "n k"], is_right: Bool[np.ndarray, "n k"]) -> np.ndarray:
    """Returns number, sum of values and number of right ones by column and bin, `[3, k, BINS]`."""
    columns = values.shape[1]
    bins = np.minimum(values * BINS, BINS - 1).astype(np.intp) + BINS * np.arange(columns)
    parts = (None, values.ravel(), is_right.ravel())
    counts = [np.bincount(bins.ravel(), part, BINS * columns) for part in parts]
    return np.reshape(counts, (3, columns, BINS))


def choose_threshold(
    mean_losses: Float[np.ndarray, " t"], num_images: int, risk: float, having: str = ""
) -> int:
    """Returns the index of the smallest threshold that keeps a risk, by conformal risk control.

    It is the smallest at which `(n R + 1) / (n + 1) <= risk`, where R, which does not grow, is the
    mean loss of n images. Then the expected loss of a new image, exchangeable with them, is at most
    `risk`. Source: Angelopoulos et al. 2022, arXiv 2208.02814, theorem 1, for losses of at most 1.

    Raises:
      UserError: there are too few images; `having` says what these have, in the message.
    """
    bound = (num_images * mean_losses + 1) / (num_images + 1)
    if bound[-1] > risk:
        raise UserError(
            f"{num_images} images{having} are too few for --risk {risk:g}: "
            f"{math.ceil(1 / risk - 1e-9) - 1} are needed to set the rule, and as many others to "
            f"fit temperatures. With these, the smallest risk is {1 / (num_images + 1):.3g}"
        )
    return int(np.argmax(bound <= risk))


@dataclasses.dataclass
class RiskCurve:
    """What each of `THRESHOLDS` gives on the images that were added.

    The loss of an image is the number of its bad pixels that are not unsure, over their largest
    possible number. For all classes, these are the wrong pixels and the valid pixels; for the
    false-negative rate of a class, the class's pixels that are predicted as another class, and the
    class's pixels. It does not grow with the threshold.

    Attributes:
      num_images, losses: number of images that have a loss, and its sum.
      sure, wrong: pixels of all images that are not unsure, and those of them that are wrong.
    """

    num_images: int = 0
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(THRESHOLDS)))
    sure: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(THRESHOLDS), int))
    wrong: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(THRESHOLDS), int))

    def add(
        self,
        calibration: Calibration,
        probabilities: Float32[np.ndarray, "n classes"],
        labels: Integer[np.ndarray, " n"],
    ) -> None:
        """Adds the valid pixels of an image."""
        ids = probabilities.argmax(axis=1)
        sureness = calibration.sureness(probabilities, ids)
        wrong, of = ids != labels, calibration.of
        counted = np.full(len(labels), True) if of is None else labels == of
        self.sure += _at_least(sureness)
        self.wrong += _at_least(sureness[wrong])
        if counted.any():
            self.losses += _at_least(sureness[wrong & counted]) / counted.sum()
            self.num_images += 1

    def at(self, threshold: float) -> dict[str, float | None]:
        """Returns the numbers at one of the thresholds; None where there is nothing to count."""
        index = int(np.searchsorted(THRESHOLDS, threshold))
        sure, wrong = int(self.sure[index]), int(self.wrong[index])
        return {
            "threshold": threshold,
            "risk": float(self.losses[index] / self.num_images) if self.num_images else None,
            "coverage": sure / int(self.sure[0]),
            "wrong_of_sure": wrong / sure if sure else None,
        }

    def points(self) -> list[dict[str, float | None]]:
        """Returns the numbers where the coverage changes by about 0.001, in its order."""
        steps = np.floor(1000 * self.sure / self.sure[0])
        kept = np.flatnonzero(np.diff(steps, append=-1))
        return [self.at(float(THRESHOLDS[index])) for index in reversed(kept)]


def _at_least(sureness: Float32[np.ndarray, " n"]) -> np.ndarray:
    """Counts the pixels that are sure at each threshold."""
    reached = np.searchsorted(THRESHOLDS, sureness, side="right") - 1
    return np.bincount(reached, minlength=len(THRESHOLDS))[::-1].cumsum()[::-1]


def predictions(
    segmenter: Segmenter, dataset: Dataset, indices: Iterable[int], progress: Callable[[], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields probabilities `[n, classes]` and labels `[n]` of the valid pixels of images.

    Raises:
      UserError: no image has valid pixels.
    """
    num_pixels = 0
    for index in indices:
        example = read_example(dataset, int(index))
        valid = example["label"] != IGNORE
        num_pixels += int(valid.sum())
        if valid.any():
            yield segmenter.probabilities(example["image"])[valid], example["label"][valid]
        progress()
    if not num_pixels:
        raise UserError(
            "every pixel of these images has the ignore label, so there is nothing to calibrate "
            "on. Look at the masks with deeplab-jax data check"
        )


def measure(
    segmenter: Segmenter, dataset: Dataset, calibration: Calibration, progress: Callable[[], None]
) -> RiskCurve:
    """Returns what a calibration gives on a split; raises as `predictions`."""
    curve = RiskCurve()
    for arrays in predictions(segmenter, dataset, range(len(dataset.source)), progress):
        curve.add(calibration, *arrays)
    return curve


@dataclasses.dataclass(frozen=True)
class Result:
    """What `calibrate` found: the calibration, and what was measured with and without it."""

    calibration: Calibration
    before: Reliability
    after: Reliability
    curve: RiskCurve


def calibrate(
    segmenter: Segmenter,
    dataset: Dataset,
    *,
    risk: float,
    of: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """Calibrates a model on a split, of images on which it was not trained.

    A class's own temperature is for the pixels that are predicted as the class, so that no
    predicted class changes. Source: class-based temperature scaling, Frenkel and Goldberger,
    EUSIPCO 2021; here by likelihood.

    Args:
      segmenter: the model, with the views in which it will predict.
      dataset: the split.
      risk: to keep, the expected loss of `RiskCurve`.
      of: id of the class whose false-negative rate is the risk; None: for all classes.
      progress: called after each image.

    Raises:
      UserError: there are too few images for the risk, or all pixels are ignored.
    """
    rng, num_images = np.random.default_rng(SEED), len(dataset.source)
    fitting, measuring = np.split(rng.permutation(num_images), [num_images // 2])
    choose_threshold(np.zeros(1), len(fitting), risk)  # raises before the work starts
    names = segmenter.classes
    num_pixels = max(64, _MAX_VALUES // (len(fitting) * len(names)))
    counts, parts = np.zeros(len(names)), []
    for image, (p, labels) in enumerate(predictions(segmenter, dataset, fitting, progress)):
        counts += np.bincount(labels, minlength=len(names))
        chosen = rng.permutation(len(labels))[:num_pixels]
        weights = np.full(len(chosen), len(labels) / len(chosen))
        logits = np.log(np.maximum(p[chosen], TINY))
        parts.append((logits, labels[chosen], weights, np.full(len(chosen), image)))
    logits, labels, weights, images = map(np.concatenate, zip(*parts, strict=True))
    temperature = checked_temperature(logits, labels, weights, images, 1.0)
    ids, found = logits.argmax(axis=1), []
    for own in (ids == index for index in range(len(names))):
        pixels = logits[own], labels[own], weights[own], images[own]
        found.append(checked_temperature(*pixels, temperature))
    temperatures = tuple(found)
    calibration = Calibration(
        FORMAT, names, views_of(segmenter), temperature, temperatures, 0.0, risk, of, {}
    )
    before, after, curve = Reliability(len(names)), Reliability(len(names)), RiskCurve()
    for p, labels in predictions(segmenter, dataset, measuring, progress):
        before.add(p, labels)
        after.add(temper(p, np.array(temperatures, np.float32)[p.argmax(axis=1)]), labels)
        curve.add(calibration, p, labels)
    having = "" if of is None else f" with {names[of]}, in half of the split,"
    mean_losses = curve.losses / max(curve.num_images, 1)
    index = choose_threshold(mean_losses, curve.num_images, risk, having)
    threshold = float(THRESHOLDS[index])
    counts += before.by_class[2].sum(axis=1)
    report: dict[str, Any] = {
        "images": num_images,
        "images_of_rule": curve.num_images,
        "seed": SEED,
        "before": before.numbers(),
        "after": after.numbers(),
        "rule": curve.at(threshold),
        "absent": [name for name, count in zip(names, counts, strict=True) if not count],
    }
    calibration = dataclasses.replace(calibration, threshold=threshold, report=report)
    return Result(calibration, before, after, curve)
