"""Strict matching of a checkpoint's arrays with a model's variables."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deeplab_jax.models.functional import Arrays, FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError, listed


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


class Match(NamedTuple):
    """Which arrays fill which variables.

    Attributes:
      used: The variable for each array that is used.
      replaced: Variables that stay random because the number of classes differs.
      missing: Variables that stay random because the checkpoint lacks them, as allowed.
      problems: What does not fit, by kind.
    """

    used: dict[str, Slot]
    replaced: tuple[str, ...]
    missing: tuple[str, ...]
    problems: dict[str, list[str]]


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


def match_arrays(
    arrays: Mapping[str, np.ndarray], slots: Mapping[str, Slot], allow_missing: str = ""
) -> Match:
    """Matches arrays with a model's variables by name, and checks their shapes and types.

    Args:
      arrays: The arrays of a checkpoint.
      slots: The model's variables by the names that their arrays have in the checkpoint.
      allow_missing: Regular expression. Variables in whose name it is found may be missing.

    Raises:
      UserError: `allow_missing` is not a regular expression.
    """
    try:
        allowed = re.compile(allow_missing or "(?!)")  # an empty expression allows nothing
    except re.error as error:
        raise UserError(
            f"allow_missing must be a regular expression, got {allow_missing!r} ({error})"
        ) from error
    used, replaced, missing = {}, [], []
    problems: dict[str, list[str]] = collections.defaultdict(list)
    for key, slot in slots.items():
        array = arrays.get(key)
        if array is None:
            if allowed.search(slot.name):
                missing.append(slot.name)
            else:
                problems["missing"].append(key)
        elif array.shape != slot.shape:
            if _differs_in_classes(slot, array.shape):
                replaced.append(slot.name)
            else:
                problems["of another shape"].append(
                    f"{key} is {list(array.shape)}, the model's is {list(slot.shape)}"
                )
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems["of another type"].append(f"{key} is {array.dtype}, not floating point")
        else:
            used[key] = slot
    if extra := list(arrays.keys() - slots.keys()):
        problems["not in the model"] = extra
    return Match(used, tuple(replaced), tuple(missing), problems)


def problem_lines(problems: Mapping[str, list[str]]) -> list[str]:
    """Returns a line for an error message for each kind of problem."""
    return [f"  {kind}: {listed(sorted(names), '; ')}" for kind, names in problems.items()]


def require_finite(arrays: Mapping[str, np.ndarray], source: str = "") -> None:
    """Checks that weights are finite and that no running variance is negative.

    Args:
      arrays: The weights by name.
      source: Where they are from, for the error message.

    Raises:
      UserError: The message lists the arrays, and how many of their values are wrong.
    """
    problems: dict[str, list[str]] = collections.defaultdict(list)
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
        lines = [f"{len(wrong)} of {len(arrays)} arrays{of_source} cannot be weights of a model:"]
        lines += problem_lines(problems)
        lines.append(
            "  training diverged or the file is damaged: use an earlier or another copy "
            "(`deeplab-jax convert --allow-nonfinite` keeps them)"
        )
        raise UserError("\n".join(lines))


def to_variables(
    arrays: Mapping[str, np.ndarray],
    used: Mapping[str, Slot],
    model: FunctionalModel,
    allow_nonfinite: bool = False,
) -> Variables:
    """Returns the variables that the used arrays fill, in the model's layout and types.

    Raises:
      UserError: As `require_finite`, unless `allow_nonfinite`.
    """
    # Copies, even where an array could be used as it is: it may be a view of a file.
    with np.errstate(over="ignore"):  # a number too large for the type becomes infinite
        values = {
            slot.name: np.array(np.transpose(arrays[key], slot.axes), slot.dtype, order="C")
            for key, slot in used.items()
        }
    for slot in used.values():
        if slot.first_channels:
            values[slot.name] = np.roll(values[slot.name], -slot.first_channels, axis=2)
    if not allow_nonfinite:
        require_finite({key: values[slot.name] for key, slot in used.items()})

    def select(group: Arrays) -> Arrays:
        return {name: values[name] for name in group if name in values}

    return Variables(select(model.abstract.params), select(model.abstract.batch_stats))


def _differs_in_classes(slot: Slot, shape: tuple[int, ...]) -> bool:
    """Whether a logits layer's array has the variable's shape except for the number of classes."""
    if not (".logits." in slot.name or slot.name.startswith("decoder.")):
        return False
    if len(shape) != len(slot.shape):
        return False
    classes_axis = slot.axes[-1]
    return all(
        axis == classes_axis or size == expected
        for axis, (size, expected) in enumerate(zip(shape, slot.shape, strict=True))
    )
