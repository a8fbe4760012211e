"""A file's arrays under the names of its family: its architecture and its variables."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from deeplab_jax.models.architecture import ARCHITECTURES, Architecture, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.families.family import Description, Family
from deeplab_jax.weights.matching import (
    ConversionReport,
    Converted,
    match_arrays,
    problem_lines,
    to_variables,
)

# Fields that shapes tell, and that a config can set.
_BACKBONE_FIELDS = ("width", "stem", "shortcut")
_HEAD_FIELDS = ("aux_head", "head_channels", "separable_aspp")


@dataclasses.dataclass(frozen=True)
class Recognised:
    """A file's arrays by the names of its family.

    Attributes:
      family: The family.
      arrays: Arrays by the names in the family's table.
      file_names: The names in the file by these.
      config: What the file says beside its arrays, see `WeightsFile.config`.
      notes: What was done and found, a sentence each.
      ignored: (name in the file, reason) of arrays outside the model.
    """

    family: Family
    arrays: dict[str, np.ndarray]
    file_names: dict[str, str]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def description(self) -> Description:
        """What names, shapes and config say of the model; may raise UserError."""
        shapes = {name: array.shape for name, array in self.arrays.items()}
        return self.family.describe(shapes, self.config)

    def architecture(self, settings: Mapping[str, Any] | None = None) -> Architecture:
        """Returns the architecture: from shapes and config, else the family's default.

        Args:
          settings: Fields of `Architecture` that override both.

        Raises:
          UserError: There is no such architecture, or a setting is invalid.
        """
        found = self.description
        if found.name not in ARCHITECTURES:
            raise UserError(
                f"the file is {self.family.title}'s with the backbone "
                f"{found.fields.get('backbone')}, which is not supported in this family"
            )
        fields = {field: value for field, value in found.fields.items() if field != "backbone"}
        fields = {**self.family.defaults, **fields, **(settings or {})}
        chosen = architecture(found.name, **fields)
        if found.num_rates not in (None, len(chosen.atrous_rates)):
            raise UserError(
                f"the file's ASPP has {found.num_rates} atrous branches, and the rates of "
                f"{self.family.title} are {_spelled(chosen.atrous_rates)}: convert it with --set "
                f"model.atrous_rates={','.join(['RATE'] * found.num_rates)}"
            )
        return chosen

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the mean and std of the channels, 0..1: the config's, else the family's."""
        return self.description.mean or self.family.mean, self.description.std or self.family.std

    def assumptions(self, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Returns "model.field=value" of each field that nothing in the file says."""
        known = {*self.description.fields, *(settings or {})}
        chosen = self.architecture(settings)
        values = {field: getattr(chosen, field) for field in self.family.assumed}
        said = [f"model.{f}={_spelled(value)}" for f, value in values.items() if f not in known]
        for field in ("mean", "std"):
            if not getattr(self.description, field):
                said.append(f"data.{field}={_spelled(getattr(self.family, field))}")
        return tuple(said)

    def with_background(self, settings: Mapping[str, Any]) -> Recognised:
        """Returns a file of one class, which has a sigmoid, as one of two with a softmax.

        The background's logit is 0: softmax([0, x]) is sigmoid(x) for the class.
        """
        slots = self.family.slots(FunctionalModel.of(self.architecture(settings)))
        arrays = dict(self.arrays)
        for key, slot in slots.items():
            if ".logits." in slot.name and key in arrays:
                both = [np.zeros_like(arrays[key]), arrays[key]]
                arrays[key] = np.concatenate(both, axis=slot.axes[-1])
        note = "The one class, which has a sigmoid, became two: background has the logit 0."
        return dataclasses.replace(self, arrays=arrays, notes=(*self.notes, note))

    def to_model(
        self,
        model: FunctionalModel,
        *,
        allow_missing: str | None = None,
        backbone_only: bool = False,
        allow_nonfinite: bool = False,
    ) -> Converted:
        """Converts the arrays to a model's variables.

        Args:
          model: The model to convert them for; arrays of any floating-point type become its.
          allow_missing: Regular expression. Variables in whose name it is found may be missing.
            None: all must be there, and logits of another number of classes are refused.
          backbone_only: Whether to convert only the backbone.
          allow_nonfinite: Whether to keep NaN and infinite values instead of refusing them.

        Raises:
          UserError: Arrays are missing, left over or of another shape; the message lists them all
            and says what would fit. Or weights are not finite.
        """
        why = {name: self.family.why_dropped(name, model, backbone_only) for name in self.arrays}
        kept = {name: array for name, array in self.arrays.items() if not why[name]}
        slots = self.family.slots(model, backbone_only=backbone_only)
        used, replaced, missing, problems = match_arrays(kept, slots, allow_missing or "")
        if replaced and allow_missing is None:
            problems["of another number of classes"] = list(replaced)
        if problems:
            part = " (its backbone)" if backbone_only else ""
            lines = [
                f"the file does not fit {model.architecture.name}{part}:",
                *problem_lines(problems),
                *self._nearest(model.architecture, backbone_only, allow_missing is not None),
                *(f"  {note}" for note in self.notes),
            ]
            raise UserError("\n".join(lines))
        types = collections.Counter(
            (kept[name].dtype.name, slot.dtype.name) for name, slot in used.items()
        )
        converted_types = (
            f"{count} arrays were {old} and became {new}."
            for (old, new), count in types.items()
            if old != new
        )
        dropped = ((self.file_names.get(n, n), reason) for n, reason in why.items() if reason)
        report = ConversionReport(
            used=tuple((self.file_names.get(n, n), slot.name) for n, slot in used.items()),
            dropped=(*dropped, *self.ignored),
            replaced=replaced,
            missing=missing,
            notes=(*self.notes, *converted_types),
        )
        return Converted(to_variables(kept, used, model, allow_nonfinite), report)

    def _nearest(self, ours: Architecture, backbone_only: bool, is_run: bool) -> list[str]:
        """Returns a line on the architecture that fits the file better than ours, or a hint."""
        try:
            found = self.architecture()
        except UserError:
            return []
        ratio = self._agreement(found, backbone_only)
        agree = f"{ratio:.0%} of the arrays agree"
        if not is_run:
            return [f"  {agree} with {found.name}, the nearest"]
        # Families with the same backbone are equal here.
        same_backbone = found.backbone == ours.backbone
        if found.name != ours.name and not (backbone_only and same_backbone):
            option = f"`--config.model.architecture={found.name}`"
            return [f"  it is nearest to {found.name} ({agree}): {option}"]
        if settings := self._settings(found, ours, backbone_only):
            return [f"  it fits with {' '.join(f'`--config.model.{each}`' for each in settings)}"]
        return [
            f"  it is nearest to {found.name} all the same ({agree}); if the file is meant to be "
            "partial, name what may be missing: `--config.init.allow_missing=REGEX`"
        ]

    def _settings(self, found: Architecture, ours: Architecture, backbone_only: bool) -> list[str]:
        """Returns "field=value" for the fields of the config with which the file fits."""
        fields = _BACKBONE_FIELDS if backbone_only else (*_BACKBONE_FIELDS, *_HEAD_FIELDS)
        differing = {
            field: getattr(found, field)
            for field in fields
            if getattr(found, field) != getattr(ours, field)
        }
        fitting = dataclasses.replace(ours, **differing, num_classes=found.num_classes)
        if not differing or self._agreement(fitting, backbone_only) < 1:
            return []
        return [f"{field}={_spelled(value)}" for field, value in differing.items()]

    def _agreement(self, chosen: Architecture, backbone_only: bool) -> float:
        """Returns the ratio of equal names and shapes to all on either side, 0..1."""
        model = FunctionalModel.of(chosen)
        slots = self.family.slots(model, backbone_only=backbone_only)
        known = {(name, slot.shape) for name, slot in slots.items()}
        found = {
            (name, array.shape)
            for name, array in self.arrays.items()
            if not self.family.why_dropped(name, model, backbone_only)
        }
        return len(found & known) / max(1, len(found | known))


def _spelled(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
