"""Presents an evaluation: its numbers as JSON, and warnings where they look wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from deeplab_jax.evaluation.evaluator import Evaluation

_MAX_PREDICTED_SHARE = 0.99  # of one class; a warning above it


def to_json(evaluation: Evaluation, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    """Returns the numbers of an evaluation by name, fractions in 0..1; None in place of NaN.

    Args:
      evaluation: to convert.
      interval: lower and upper end of the mIoU's confidence interval, if it was computed.
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
        return None if value is None or math.isnan(value) else float(value)

    return {
        "images": evaluation.num_images,
        **{name: convert(value) for name, value in values.items()},
        "confusion_matrix": evaluation.matrix.tolist(),
    }


def warnings(evaluation: Evaluation) -> list[str]:
    """Returns what may be wrong with the model or the labels, one sentence each."""
    names, scores = evaluation.labels.names, evaluation.scores
    messages = []
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
            chosen = [name for name, flag in zip(names, selected, strict=True) if flag]
            messages.append(f"{message}: {', '.join(chosen)}")
    return messages
