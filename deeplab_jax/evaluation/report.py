"""Presents an evaluation: its numbers as JSON, and warnings where they look wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from deeplab_jax.evaluation.binary import Curves
from deeplab_jax.evaluation.tally import Evaluation

_MAX_PREDICTED_SHARE = 0.99  # of one class; a warning above it


def to_json(evaluation: Evaluation, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    """Returns the numbers of an evaluation by name, fractions in 0..1; None in place of NaN.

    `interval` is the mIoU's confidence interval, if it was computed.
    """
    values = dataclasses.asdict(evaluation.scores) | {
        "miou_interval": interval,
        "boundary_miou": evaluation.boundary_miou,
        "per_class_boundary_iou": evaluation.per_class_boundary_iou,
    }

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return dict(zip(evaluation.labels.names, map(convert, value), strict=True))
        if isinstance(value, tuple):
            return [convert(number) for number in value]
        return None if value is None else _finite(value)

    return {
        "images": evaluation.num_images,
        **{name: convert(value) for name, value in values.items()},
        "confusion_matrix": evaluation.matrix.tolist(),
        "binary": binary(evaluation),
    }


def binary(evaluation: Evaluation) -> dict[str, Any] | None:
    """Returns the numbers of the positive class, if there is one; None in place of NaN."""
    positive, curves, scores = evaluation.positive, evaluation.curves, evaluation.positive_scores
    if positive is None or curves is None or scores is None:
        return None
    numbers: dict[str, float] = scores._asdict()
    numbers["auroc"], numbers["auroc_error"] = curves.auroc
    numbers["average_precision"], numbers["average_precision_error"] = curves.average_precision
    numbers["best_f1"], numbers["best_threshold"], numbers["best_f1_error"] = curves.best_f1
    return {
        "positive": evaluation.labels.names[positive.class_id],
        "threshold": positive.threshold,
        "positive_pixels": curves.num_positives,
        "negative_pixels": curves.num_negatives,
        **{name: _finite(value) for name, value in numbers.items()},
    }


def curve_points(curves: Curves) -> dict[str, list[float | None]]:
    """Returns `Curves.points` for JSON."""
    return {name: list(map(_finite, values)) for name, values in curves.points().items()}


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def warnings(evaluation: Evaluation) -> list[str]:
    """Returns what may be wrong with the model or the labels, one sentence each."""
    names, scores, messages = evaluation.labels.names, evaluation.scores, []
    share = scores.per_class_predicted_share
    if len(share) > 1 and np.any(share > _MAX_PREDICTED_SHARE):
        index = int(share.argmax())
        messages.append(
            f"{100 * share[index]:.1f} % of the pixels are predicted as {names[index]}, which is "
            f"{100 * scores.per_class_true_share[index]:.1f} % of the labels. Likely causes: an "
            "untrained model, another normalization than in training, or wrong label ids."
        )
    labelled, predicted = evaluation.matrix.sum(1) > 0, evaluation.matrix.sum(0) > 0
    for message, selected in (
        ("in no label of these images", ~labelled),
        ("never predicted, though labelled", labelled & ~predicted),
    ):
        if selected.any():
            messages.append(f"{message}: {', '.join(itertools.compress(names, selected))}")
    curves, positive = evaluation.curves, evaluation.positive
    if curves and positive and not (curves.num_positives and curves.num_negatives):
        what = "AUROC, average precision" if not curves.num_positives else "AUROC"
        which = "no" if not curves.num_positives else "every"
        messages.append(
            f"{what} and the ROC curve are undefined: {which} pixel of these images is labelled "
            f"{names[positive.class_id]}"
        )
    return messages
