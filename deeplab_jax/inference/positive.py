"""One class against the rest: its probability is a score, from which a threshold makes ids."""

from __future__ import annotations

from typing import Any, NamedTuple

from deeplab_jax.data.labels import LabelSet, class_id, default_positive
from deeplab_jax.utils.errors import UserError


class PositiveClass(NamedTuple):
    """A class against the rest.

    Attributes:
      class_id: id of the class.
      threshold: probability from which on a pixel is of the class; None: where it is the most
        probable class.
    """

    class_id: int
    threshold: float | None = None


def resolve(
    labels: LabelSet, positive: str = "", threshold: float | None = None
) -> PositiveClass | None:
    """Returns the class and threshold that two options name, which errors call by their names.

    An empty `positive` is, of two classes, the one that is not background; for other numbers of
    classes, without a threshold, the result is None.

    Raises:
      UserError: there is no such class, the threshold is not in 0..1, or the model has other than
        two classes and `positive` is empty.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        percent = f"; {threshold:g} % is --threshold {threshold / 100:g}" if threshold > 1 else ""
        raise UserError(f"--threshold must be a probability, 0 to 1, got {threshold:g}{percent}")
    index = class_id(positive, labels, "--positive: ") if positive else default_positive(labels)
    if index is not None:
        return PositiveClass(index, threshold)
    if threshold is not None:
        raise missing("--threshold", labels)
    return None


def missing(option: str, labels: LabelSet) -> UserError:
    """Returns the error for an option that needs `--positive`."""
    return UserError(
        f"{option} needs --positive CLASS, the class against the rest, for a model of "
        f"{labels.num_classes} classes: one of {', '.join(labels.names)}"
    )


def choose_ids(ranked: Any, scores: Any, positive: PositiveClass | None) -> Any:
    """Returns the class of each pixel, as integers `[..., h, w]`, of NumPy's or JAX's arrays.

    With a threshold, pixels whose score reaches it are positive, and the others of the most
    probable other class. Otherwise all are of the most probable class.

    Args:
      ranked: logits or probabilities `[..., h, w, classes]`.
      scores: probability of the positive class, `[..., h, w]`.
      positive: the class, if any.
    """
    xp = ranked.__array_namespace__()
    if positive is None or positive.threshold is None:
        return xp.argmax(ranked, axis=-1)
    others = xp.where(xp.arange(ranked.shape[-1]) == positive.class_id, -xp.inf, ranked)
    return xp.where(scores >= positive.threshold, positive.class_id, xp.argmax(others, axis=-1))
