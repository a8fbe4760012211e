"""Strict matching of a checkpoint's arrays with a model's variables."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deeplab_jax.models.functional import Arrays, FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError, listed

Problems = dict[str, list[str]]  # names of arrays by what is wrong with them


class Slot(NamedTuple):
    """A variable of the model, and the array that it must be filled with.

    Attributes:
      name: The variable's name.
      axes: The array's axes in the order of the variable's.
      shape: The array's shape.
      dtype: The variable's type.
      first_channels: Number of the array's first input channels that are the variable's last.
    """

    name: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    first_channels: int = 0


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """How the arrays of a checkpoint were used.

    Attributes:
      used: `(array, variable)`, the names in the checkpoint and in the model, for each array used.
      dropped: `(array, reason)` for each array that the model has no use for.
      replaced: Variables that stay random because the number of classes differs.
      missing: Variables that stay random because the checkpoint lacks them, as allowed.
      notes: What else was changed, one sentence each.
    """

    used: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...] = ()
    replaced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Converted(NamedTuple):
    """A model's variables, without those that the report lists as replaced or missing."""

    variables: Variables
    report: ConversionReport


def own_slots(model: FunctionalModel) -> dict[str, Slot]:
    """Returns the slots of a file with the names, axes and types of this package."""
    return {
        name: Slot(name, tuple(range(value.ndim)), value.shape, value.dtype)
        for name, value in (model.abstract.params | model.abstract.batch_stats).items()
    }


def fill(
    model: FunctionalModel,
    slots: Mapping[str, Slot],
    arrays: Mapping[str, np.ndarray],
    *,
    source: str = "the file",
    allow_missing: str | None = None,
    allow_nonfinite: bool = False,
    hints: Callable[[], Iterable[str]] = tuple,
) -> Converted:
    """Returns the variables that arrays fill, in the model's layout and types.

    Args:
      model: The model.
      slots: Its variables by the names that their arrays have.
      arrays: The arrays, each of which must have a slot.
      source: Where they are from, for the error message.
      allow_missing: Regular expression. Variables in whose name it is found may be missing. None:
        all must be there, and logits of another number of classes are refused.
      allow_nonfinite: Whether to keep NaN and infinite values instead of refusing them.
      hints: Returns further lines for the error message.

    Raises:
      UserError: Arrays are missing, left over, or of another shape or type; the message lists them
        all. Or weights are not finite. Or `allow_missing` is not a regular expression.
    """
    try:
        allowed = re.compile(allow_missing or "(?!)")  # an empty expression allows nothing
    except re.error as error:
        raise UserError(
            f"allow_missing must be a regular expression, got {allow_missing!r} ({error})"
        ) from error
    used: dict[str, Slot] = {}
    replaced, missing = [], []
    problems: Problems = collections.defaultdict(list)
    for key, slot in slots.items():
        array = arrays.get(key)
        if array is None and allowed.search(slot.name):
            missing.append(slot.name)
        elif array is None:
            problems["missing"].append(key)
        elif allow_missing is not None and _differs_in_classes(slot, array.shape):
            replaced.append(slot.name)
        elif array.shape != slot.shape:
            shapes = f"{list(array.shape)}, the model's is {list(slot.shape)}"
            problems["of another shape"].append(f"{key} is {shapes}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems["of another type"].append(f"{key} is {array.dtype}, not floating point")
        else:
            used[key] = slot
    if extra := list(arrays.keys() - slots.keys()):
        problems["not in the model"] = extra
    if problems:
        headline = f"{source} does not fit {model.architecture.name}:"
        raise UserError("\n".join([headline, *_lines(problems), *hints()]))
    types = collections.Counter((arrays[k].dtype.name, s.dtype.name) for k, s in used.items())
    report = ConversionReport(
        tuple((key, slot.name) for key, slot in used.items()),
        replaced=tuple(replaced),
        missing=tuple(missing),
        notes=tuple(
            f"{count} arrays were {old} and became {new}."
            for (old, new), count in types.items()
            if old != new
        ),
    )
    values = {slot.name: _value(arrays[key], slot) for key, slot in used.items()}
    if not allow_nonfinite:
        require_finite({key: values[slot.name] for key, slot in used.items()})

    def select(group: Arrays) -> Arrays:
        return {name: values[name] for name in group if name in values}

    return Converted(Variables(*map(select, model.abstract)), report)


def require_finite(arrays: Mapping[str, np.ndarray], source: str = "") -> None:
    """Checks that weights are finite and that no running variance is negative.

    Raises:
      UserError: The message lists the arrays, and how many of their values are wrong.
    """
    problems: Problems = collections.defaultdict(list)
    wrong = set()
    for name, array in arrays.items():
        is_variance = name.endswith(("running_var", ".var"))
        counts = {
            "NaN or infinite": array.size - np.count_nonzero(np.isfinite(array)),
            "negative variances": np.count_nonzero(array < 0) if is_variance else 0,
        }
        for kind, count in counts.items():
            if count:
                wrong.add(name)
                problems[kind].append(f"{name} ({count} of {array.size} {array.dtype} values)")
    if problems:
        of_source = f" of {source}" if source else ""
        lines = [
            f"{len(wrong)} of {len(arrays)} arrays{of_source} cannot be weights of a model:",
            *_lines(problems),
            "  training diverged or the file is damaged: use an earlier or another copy "
            "(`deeplab-jax convert --allow-nonfinite` keeps them)",
        ]
        raise UserError("\n".join(lines))


def _lines(problems: Problems) -> list[str]:
    return [f"  {kind}: {listed(sorted(names), '; ')}" for kind, names in problems.items()]


@np.errstate(over="ignore")  # a number too large for the type becomes infinite
def _value(array: np.ndarray, slot: Slot) -> np.ndarray:
    """Returns a copy, even of an array that could be used as it is: it may be a view of a file."""
    value = np.array(np.transpose(array, slot.axes), slot.dtype, order="C")
    return np.roll(value, -slot.first_channels, axis=2) if slot.first_channels else value


def _differs_in_classes(slot: Slot, shape: tuple[int, ...]) -> bool:
    """Whether a logits layer's array differs from the variable only in the number of classes."""
    is_logits = ".logits." in slot.name or slot.name.startswith("decoder.")
    if not is_logits or len(shape) != len(slot.shape):
        return False
    differing = [axis for axis, n in enumerate(shape) if n != slot.shape[axis]]
    return differing == [slot.axes[-1]]
