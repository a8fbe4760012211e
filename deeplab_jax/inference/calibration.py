"""Calibrated probabilities, and the rule that says at which pixels a model is unsure.

`evaluation.calibration` finds both on a split of a data set.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float32, Integer

from deeplab_jax.config.rules import type_problems
from deeplab_jax.utils.errors import UserError, print_warning
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.utils.paths import is_bucket

if TYPE_CHECKING:
    from deeplab_jax.inference.segmenter import Segmenter

FORMAT = 1
_ROWS = 1 << 16  # pixels at once, so that photos need little memory
TINY = float(np.finfo(np.float32).tiny)  # for a softmax in float32, which may give 0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `deeplab-jax calibrate` found about a model.

    Attributes:
      format: of the file.
      classes: names of the model's classes.
      views: output stride, scales, mirror images and windows with which it was found.
      temperature: of all pixels.
      temperatures: of the pixels that are predicted as each class.
      threshold: of `sureness`; below it, a pixel is unsure.
      risk: that the rule keeps in expectation, the mean loss of `evaluation.calibration.RiskCurve`.
      of: id of the class whose false-negative rate is the risk; None: the share of wrong pixels.
      report: what was measured, and on what.
    """

    format: int
    classes: tuple[str, ...]
    views: dict  # type: ignore[type-arg]
    temperature: float
    temperatures: tuple[float, ...]
    threshold: float
    risk: float
    of: int | None
    report: dict  # type: ignore[type-arg]

    def sureness(
        self, probabilities: Float32[np.ndarray, "*n classes"], ids: Integer[np.ndarray, "*n"]
    ) -> Float32[np.ndarray, "*n"]:
        """Computes the number of each pixel that is compared with the threshold.

        It is the calibrated probability of the predicted class. Of a rule for one class, it is 1
        minus the calibrated probability of that class, and infinite where that class is predicted.
        """
        flat = probabilities.reshape(-1, probabilities.shape[-1])
        result = np.empty(len(flat), np.float32)
        predicted = ids.reshape(-1)
        for start in range(0, len(flat), _ROWS):
            rows = slice(start, start + _ROWS)
            classes = predicted[rows].astype(np.intp)
            temperatures = np.asarray(self.temperatures, np.float32)[classes]
            scaled = temper(flat[rows], temperatures)
            chosen = classes if self.of is None else np.full_like(classes, self.of)
            result[rows] = np.take_along_axis(scaled, chosen[:, None], axis=1)[:, 0]
        if self.of is not None:
            result = np.where(predicted == self.of, np.float32(np.inf), 1 - result)
        return result.reshape(ids.shape)

    def rule(self) -> str:
        """Returns in words where a pixel is unsure."""
        if self.threshold > 1:
            return "everywhere"
        if self.of is None:
            return f"where the calibrated probability is below {self.threshold:.4g}"
        name = self.classes[self.of]
        return f"where the calibrated probability of {name} is above {1 - self.threshold:.4g}"

    def promise(self) -> str:
        """Returns in words what the rule keeps, in expectation."""
        what = "the pixels of an image are wrong"
        if self.of is not None:
            name = self.classes[self.of]
            what = f"the pixels of {name} in an image are predicted as another class"
        return f"on average at most {100 * self.risk:g} % of {what} and not unsure"

    def write(self, path: pathlib.Path) -> None:
        """Writes it as JSON."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)
        write_bytes(path, f"{text}\n".encode())


def read(path: str | os.PathLike[str], classes: Sequence[str]) -> Calibration:
    """Reads a file of `Calibration.write`, which may be in a bucket.

    Raises:
      UserError: the file cannot be read, or belongs to a model of other classes.
    """
    local = path
    if is_bucket(path):
        from deeplab_jax.buckets import staging

        local = staging.stage(str(path), title="a calibration")
    try:
        values = json.loads(pathlib.Path(local).read_bytes())
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {values.get('format')!r}, expected {FORMAT}")
        for name in ("classes", "temperatures"):
            values[name] = tuple(values[name])
        found = Calibration(**values)
        for problem in type_problems(found, ""):
            raise ValueError(problem)
        num_classes = len(found.classes)
        is_valid = [0 < t < math.inf for t in found.temperatures]
        in_range = 0 <= found.threshold <= 2 and 0 < found.risk < 1
        in_range = in_range and 0 <= (found.of or 0) < num_classes
        if not in_range or is_valid != [True] * num_classes:
            raise ValueError("a temperature, the threshold, the risk or the class is out of range")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be read as a calibration ({reason}): write it with deeplab-jax "
            "calibrate"
        ) from None
    if found.classes != tuple(classes):
        raise UserError(
            f"{path} is the calibration of another model, with the classes "
            f"{', '.join(found.classes)}; this one has {', '.join(classes)}"
        )
    return found


def temper(
    probabilities: Float[np.ndarray, "n classes"], temperatures: Float[np.ndarray, " n"] | float
) -> Float[np.ndarray, "n classes"]:
    """Divides logits by temperatures: returns `p ** (1 / T)`, normalized.

    Of averages over views and windows, it is applied to the average (arXiv 2007.08792, "pool, then
    calibrate").
    """
    scaled = np.log(np.maximum(probabilities, TINY)) / np.reshape(temperatures, (-1, 1))
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def require_calibration(segmenter: Segmenter) -> Calibration:
    """Returns the calibration of a model, with a warning if it is for other settings.

    Raises:
      UserError: there is none.
    """
    found = segmenter.calibration
    if found is None:
        raise UserError(
            f"{segmenter.path} has no calibration: run deeplab-jax calibrate, or give --calibration"
        )
    ours = views_of(segmenter)
    if differing := [name for name in ours if found.views.get(name) != ours[name]]:
        spelled = ", ".join(
            f"{name} {found.views.get(name)}, now {ours[name]}" for name in differing
        )
        print_warning(f"the calibration was made with {spelled}: its risk may not hold here")
    return found


def views_of(segmenter: Segmenter) -> dict[str, Any]:
    """Returns the settings of a segmenter's predictions, as JSON holds them."""
    views = dataclasses.asdict(segmenter.tta) | {"scales": list(segmenter.tta.scales)}
    return {"output_stride": segmenter.architecture.output_stride} | views
