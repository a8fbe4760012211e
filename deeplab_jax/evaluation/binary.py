"""Scores of one class against the rest at every threshold: AUROC, average precision, best F1.

Scores are the float32 probabilities of the positive class. They are never all kept: up to
`MAX_EXACT` are, for exact results; more are counted in a histogram, and each result then has an
error bound that is computed from the histogram itself.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Float32, Int64, Integer, UInt32

MAX_EXACT = 1 << 22  # pixels whose scores are kept, 4 bytes each
_SHIFT = 11  # bits that a bin drops of a key: 4096 bins for each factor of 2 of p or 1 - p
_HALF = 0x3F000000  # bits of float32 0.5
_NUM_BINS = (2 * _HALF >> _SHIFT) + 1


def score_keys(scores: Float32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Returns integers in the order of the scores, different for different scores.

    The key of p <= 0.5 is its bits; that of p > 0.5 mirrors the bits of 1 - p, a difference that
    float32 represents exactly. So equal steps of keys are finest near 0 and near 1, where trained
    models put most pixels, as steps of the log-odds are. NaN counts as 0.
    """
    scores = np.abs(np.fmin(np.fmax(scores, np.float32(0)), np.float32(1)))  # abs: of -0.0
    mirrored = 2 * _HALF - (1 - scores).view(np.uint32)
    return np.where(scores > 0.5, mirrored, scores.view(np.uint32))


def smallest_scores(keys: UInt32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Returns the smallest float32 score of each key or of a larger one; see `score_keys`."""
    from_one = 1 - (2 * _HALF - np.maximum(keys, _HALF)).view(np.float32).astype(np.float64)
    above = from_one.astype(np.float32)
    above = np.where(above < from_one, np.nextafter(above, np.float32(2)), above)
    return np.where(keys > _HALF, above, keys.view(np.float32))


class ScoreCounts:
    """Counts the pixels of images by score and label, in memory that does not grow."""

    def __init__(self) -> None:
        self._pending: list[np.ndarray] = []  # 2 * key + whether the pixel is positive
        self._num_pending = 0
        self._histogram: np.ndarray | None = None  # [bins, negative or positive]

    def add(self, scores: Float32[np.ndarray, " n"], is_positive: Bool[np.ndarray, " n"]) -> None:
        """Adds pixels, of which those that are ignored are left out already."""
        keys = 2 * score_keys(scores) + is_positive
        self._pending.append(keys)
        self._num_pending += len(keys)
        if self._num_pending > MAX_EXACT:
            self._count_pending()

    def _count_pending(self) -> np.ndarray:
        """Moves the scores that are kept to the histogram; returns it."""
        keys = np.concatenate([np.zeros(0, np.uint32), *self._pending])
        # Rounded up, so that 0 and 1 have a bin of their own.
        bins = (((keys >> 1) + ((1 << _SHIFT) - 1)) >> _SHIFT) * 2 + (keys & 1)
        counts = np.bincount(bins, minlength=2 * _NUM_BINS).reshape(-1, 2)
        self._histogram = counts if self._histogram is None else self._histogram + counts
        self._pending, self._num_pending = [], 0
        return self._histogram

    def curves(self) -> Curves:
        """Returns the curves of all pixels of all hosts; every host must call it."""
        if self._histogram is None and jax.process_count() == 1:
            keys = np.sort(np.concatenate([np.zeros(0, np.uint32), *self._pending]))
            first = np.flatnonzero(np.diff(keys >> 1, prepend=np.uint32(2**31)))
            positives = np.add.reduceat(keys & 1, first, dtype=np.int64) if len(keys) else first
            groups = np.stack([np.diff(first, append=len(keys)) - positives, positives], axis=1)
            return _curves(keys[first] >> 1, groups, np.full(len(first), True))
        counts = self._count_pending()
        # As pairs of int32: JAX would cut int64 to 32 bits.
        hosts = multihost_utils.process_allgather(counts.view(np.int32))
        counts = np.asarray(hosts).reshape(-1, *counts.shape[:1], 4).view(np.int64).sum(axis=0)
        bins = np.flatnonzero(counts.any(axis=1))
        keys = np.maximum((bins - 1 << _SHIFT) + 1, 0).astype(np.uint32)  # the smallest
        # 1 - p is a multiple of 2^-24: near 1, different scores have different bins.
        near_one = keys >= score_keys(np.array([1 - 2.0**-_SHIFT], np.float32))
        is_one_score = (bins == 0) | near_one | (counts[bins].sum(axis=1) == 1)
        return _curves(keys, counts[bins], is_one_score)


@dataclasses.dataclass(frozen=True)
class Curves:
    """What a threshold of the score gives, for the ROC and the precision-recall curve.

    At point i, pixels with a score of `thresholds[i]` or more count as predicted. The points are
    exact. Between neighbouring points of a histogram there may be more.

    Attributes:
      thresholds: scores, decreasing.
      true_positives, false_positives: pixels of each point; the last one has all.
      is_one_score: whether the pixels between a point and the one before have all the same score.
    """

    thresholds: Float32[np.ndarray, " n"]
    true_positives: Int64[np.ndarray, " n"]
    false_positives: Int64[np.ndarray, " n"]
    is_one_score: Bool[np.ndarray, " n"]

    @property
    def num_positives(self) -> int:
        return int(self.true_positives[-1]) if len(self.true_positives) else 0

    @property
    def num_negatives(self) -> int:
        return int(self.false_positives[-1]) if len(self.false_positives) else 0

    @functools.cached_property
    def _steps(self) -> tuple[np.ndarray, ...]:
        """For each point, as float64: tp and fp before it, and how much it adds to each."""
        tp, fp = (x.astype(np.float64) for x in (self.true_positives, self.false_positives))
        more_tp, more_fp = np.diff(tp, prepend=0), np.diff(fp, prepend=0)
        return tp - more_tp, fp - more_fp, more_tp, more_fp

    @property
    def auroc(self) -> tuple[float, float]:
        """Area under the ROC curve, and its error bound; NaN without positives or negatives.

        Pixels of equal score count half, as in the trapezoidal rule. The order of the pixels within
        a bin is unknown: the bound is half of the share of their pairs.
        """
        if not self.num_positives or not self.num_negatives:
            return float("nan"), float("nan")
        tp, _, more_tp, more_fp = self._steps
        pairs = float(self.num_positives) * self.num_negatives
        unknown = (more_tp * more_fp)[~self.is_one_score].sum() / 2
        return float((more_fp * (tp + more_tp / 2)).sum() / pairs), float(unknown / pairs)

    @property
    def average_precision(self) -> tuple[float, float]:
        """Sum of precision * (gain of recall) over thresholds, and its error bound.

        NaN without positives. A positive pixel's precision is at most that of a bin's positives
        before its negatives. It is at least that of each single positive after them, whose sum is
        bounded by the integral of x / (x + fp).
        """
        if not self.num_positives:
            return float("nan"), float("nan")
        tp, fp, more_tp, more_fp = self._steps
        all_fp = fp + more_fp
        exact = more_tp * (tp + more_tp) / np.maximum(tp + more_tp + all_fp, 1)
        upper = more_tp * (tp + more_tp) / np.maximum(tp + more_tp + fp, 1)
        lower = more_tp - all_fp * np.log1p(more_tp / np.maximum(tp + all_fp, 1))
        low = np.where(self.is_one_score, exact, lower).sum()
        high = np.where(self.is_one_score, exact, upper).sum()
        middle, half = (high + low) / 2, (high - low) / 2
        return float(middle / self.num_positives), float(half / self.num_positives)

    @property
    def f1(self) -> Float[np.ndarray, " n"]:
        """F1 of each point."""
        tp, fp = self.true_positives, self.false_positives
        return 2 * tp / np.maximum(tp + fp + self.num_positives, 1)

    @property
    def best_f1(self) -> tuple[float, float, float]:
        """Largest F1 of all points, its threshold, and how much larger the best F1 may be."""
        if not self.num_positives:
            return float("nan"), float("nan"), float("nan")
        tp, fp, more_tp, _ = self._steps
        f1 = self.f1
        within = 2 * (tp + more_tp) / (tp + more_tp + fp + self.num_positives)
        highest = np.where(self.is_one_score, f1, within).max()
        index = int(f1.argmax())
        return float(f1[index]), float(self.thresholds[index]), float(highest - f1[index])

    def points(self, num_points: int = 1000) -> dict[str, np.ndarray]:
        """Returns the curves' coordinates, thinned evenly along them to at most twice `num_points`.

        Both ends, the best F1, and both ends of longer steps are kept. Rates of no pixels are NaN.
        """
        tp, fp = self.true_positives, self.false_positives
        with np.errstate(invalid="ignore", divide="ignore"):
            values = {
                "threshold": self.thresholds.astype(np.float64),
                "recall": tp / np.float64(self.num_positives),
                "false_positive_rate": fp / np.float64(self.num_negatives),
                "precision": tp / (tp + fp),
            }
        _, *rates = values.values()
        length = sum(np.abs(np.diff(np.nan_to_num(rate), prepend=0)) for rate in rates)
        step = np.floor(np.cumsum(length) * num_points / max(float(np.sum(length)), 1e-12))
        changes = np.diff(step) > 0
        kept = np.concatenate([[True], changes]) | np.concatenate([changes, [True]])
        kept[self.f1.argmax()] = True
        return {name: value[kept] for name, value in values.items()}


def _curves(
    keys: np.ndarray, counts: Integer[np.ndarray, "n 2"], is_one_score: np.ndarray
) -> Curves:
    """Makes the curves of groups in increasing order, from (negative, positive) pixels of each."""
    total = counts[::-1].cumsum(axis=0, dtype=np.int64)
    scores = smallest_scores(keys)[::-1]
    return Curves(scores, total[:, 1], total[:, 0], is_one_score[::-1])
