"""What is said of an evaluation: as JSON, and as warnings where the numbers look wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deeplab_jax.evaluation.boundary import boundary_iou
from deeplab_jax.evaluation.confusion import Scores, bootstrap_miou, nan_mean
from deeplab_jax.evaluation.evaluator import Evaluation

_NEARLY_ALL = 0.99  # share of the predictions that no one class should have


@dataclasses.dataclass(frozen=True)
class Report:
    """The numbers of an evaluation, shares in 0..1; NaN where there is none.

    Attributes:
      names: of the classes.
      matrix: int64 `[classes, classes]`, true by predicted.
      images: how many were evaluated.
      scores: of the matrix.
      interval: lower and upper end of the mIoU's 95 % bootstrap interval, if it was asked for.
      per_class_boundary_iou: if it was asked for.
    """

    names: tuple[str, ...]
    matrix: np.ndarray
    images: int
    scores: Scores
    interval: tuple[float, float] | None
    per_class_boundary_iou: np.ndarray | None

    @property
    def boundary_miou(self) -> float | None:
        known = self.per_class_boundary_iou
        return None if known is None else nan_mean(known)

    def to_json(self) -> dict[str, Any]:
        """Numbers by name; null where there is none."""
        scores = self.scores
        return {
            "images": self.images,
            "miou": _number(scores.miou),
            "miou_interval": None if self.interval is None else [_number(x) for x in self.interval],
            "miou_without_background": _number(scores.miou_without_background),
            "pixel_accuracy": _number(scores.pixel_accuracy),
            "mean_accuracy": _number(scores.mean_accuracy),
            "frequency_weighted_iou": _number(scores.frequency_weighted_iou),
            "boundary_miou": _number(self.boundary_miou),
            "per_class_iou": self._by_name(scores.per_class_iou),
            "per_class_accuracy": self._by_name(scores.per_class_accuracy),
            "per_class_boundary_iou": self._by_name(self.per_class_boundary_iou),
            "per_class_true_share": self._by_name(scores.true_share),
            "per_class_predicted_share": self._by_name(scores.predicted_share),
            "confusion_matrix": self.matrix.tolist(),
        }

    def _by_name(self, values: np.ndarray | None) -> dict[str, float | None] | None:
        if values is None:
            return None
        return {name: _number(value) for name, value in zip(self.names, values, strict=True)}

    def warnings(self) -> list[str]:
        """What may be wrong with the model or the labels, a sentence each."""
        return [
            *self._one_class_takes_all(),
            *_listed("in no label of these images", self.names, self.matrix.sum(1) == 0),
            *_listed(
                "never predicted, though labelled",
                self.names,
                (self.matrix.sum(1) > 0) & (self.matrix.sum(0) == 0),
            ),
        ]

    def _one_class_takes_all(self) -> list[str]:
        share = self.scores.predicted_share
        if len(share) == 1 or not np.any(share > _NEARLY_ALL):
            return []
        index = int(share.argmax())
        return [
            f"{100 * share[index]:.1f} % of the pixels are predicted as {self.names[index]}, which "
            f"is {100 * self.scores.true_share[index]:.1f} % of the labels. An untrained model, "
            "another normalisation than in training, or wrong label ids look like this."
        ]


def make_report(evaluation: Evaluation, *, resamples: int, seed: int = 0) -> Report:
    """The numbers of an evaluation.

    Args:
      evaluation: with `matrices` if an interval is to be had.
      resamples: of the bootstrap; 0: no interval.
      seed: of the bootstrap.
    """
    interval = None
    if resamples:
        assert evaluation.matrices is not None
        interval = bootstrap_miou(evaluation.matrices, resamples=resamples, seed=seed)
    counts = evaluation.boundary
    return Report(
        names=evaluation.labels.names,
        matrix=evaluation.matrix,
        images=evaluation.images,
        scores=evaluation.scores,
        interval=interval,
        per_class_boundary_iou=None if counts is None else boundary_iou(counts),
    )


def _listed(what: str, names: Sequence[str], flags: np.ndarray) -> list[str]:
    found = [name for name, flag in zip(names, flags, strict=True) if flag]
    return [f"{what}: {', '.join(found)}"] if found else []


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or math.isnan(value) else float(value)
