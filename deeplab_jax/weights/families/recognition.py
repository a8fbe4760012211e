"""Recognising a file's family, architecture and variables, or saying why it belongs to none.

Prefixes that wrappers add to all names are removed first. Only the names decide the family:
exactly one family's signature must match.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deeplab_jax.models.architecture import Architecture, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError, did_you_mean, listed
from deeplab_jax.weights.families.family import ConfigFields, Family, Shapes, any_begins
from deeplab_jax.weights.families.mmseg import MMSEG
from deeplab_jax.weights.families.mobilenet_v2 import HF, TF
from deeplab_jax.weights.families.reading import ShapeFields, read_shapes
from deeplab_jax.weights.families.smp import SMP
from deeplab_jax.weights.families.torchvision import TIMM, TORCHVISION
from deeplab_jax.weights.families.vainf import VAINF
from deeplab_jax.weights.matching import Converted, fill

FAMILIES: dict[str, Family] = {
    family.name: family for family in (TORCHVISION, MMSEG, SMP, VAINF, HF, TF, TIMM)
}

# First parts of the names of models and backbones. Any other part that all names begin with was
# added by a wrapper: "module" by `DataParallel`, "_orig_mod" by `torch.compile`, "model" or "net"
# by a training script's own module.
_TOP_MODULE = re.compile(
    r"backbone|(?:aux_)?classifier|features|conv1|bn1|layer\d|fc|\d+|stem|encoder|decoder"
    r"|(?:decode|auxiliary|segmentation|classification)_head|mobilenet_v2"
)
_MAX_WRAPPERS = 8
_AVERAGED = "n_averaged"  # of `torch.optim.swa_utils.AveragedModel`

# What names say of other tasks' files: regular expressions, each of which must match the beginning
# of some name, and the task.
_OTHER_TASKS = (
    (r"decode_head\.c1_bottleneck\.", "a DeepLabv3+ of mmsegmentation"),
    (r"decode_head\.psp_modules\.", "a PSPNet or UPerNet of mmsegmentation"),
    (r"decode_head\.convs\.", "an FCN of mmsegmentation"),
    (r"decode_head\.", "another model of mmsegmentation or transformers"),
    (r"segmentation_head\.0\.", r"decoder\.blocks\.", "a U-Net of segmentation_models.pytorch"),
    (r"segmentation_head\.0\.", "another model of segmentation_models.pytorch"),
    (r"backbone\.", r"classifier\.0\.weight", r"classifier\.4\.", "an FCN of torchvision"),
    (r"backbone\.", r"classifier\.cbr\.", "an LR-ASPP of torchvision"),
    (r"mobilenet_v2\.", r"classifier\.weight", "a classifier of transformers"),
    (r"(?:backbone\.)?(?:fc|classifier|head)\.", r"(?:conv1|features|stem)\.", "a classifier"),
    (r"(?:backbone\.)?(?:conv1|stem)\.", r"(?:backbone\.)?layer1\.", "a backbone"),
    (r"(?:rpn|roi_heads|bbox_head)\.", "a detector"),
)
_KNOWN_BACKBONE = r"(?:backbone\.|encoder\.|features\.|mobilenet_v2\.)?\w*(?:layer1|conv_stem|0)\."
# Fields that shapes tell and a config of a run can set.
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
    def _shapes(self) -> Shapes:
        return {name: array.shape for name, array in self.arrays.items()}

    @functools.cached_property
    def shape_fields(self) -> ShapeFields:
        """What the shapes of the arrays tell of the model; see `read_shapes`."""
        return read_shapes(self.family, self._shapes)

    @functools.cached_property
    def config_fields(self) -> ConfigFields:
        """The model's settings in `config`; see `Family.read_config`."""
        return self.family.read_config(self.config, self._shapes)

    def architecture(self, settings: Mapping[str, Any] | None = None) -> Architecture:
        """Returns the architecture: from settings, config, shapes, or the family's default.

        Raises:
          UserError: There is no such architecture, or a setting is invalid.
        """
        # Before the shapes: a config's error names a backbone that shapes only miss.
        config = self.config_fields.fields
        fields = {**self.family.defaults, **self.shape_fields.fields, **config, **(settings or {})}
        chosen = architecture(self.shape_fields.name, **fields)
        num_rates = self.shape_fields.num_rates
        if num_rates not in (None, len(chosen.atrous_rates)):
            raise UserError(
                f"the file's ASPP has {num_rates} atrous branches, and the rates of "
                f"{self.family.title} are {_spelled(chosen.atrous_rates)}: convert it with --set "
                f"model.atrous_rates={','.join(['RATE'] * num_rates)}"
            )
        return chosen

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the mean and std of the channels, 0..1: the config's, else the family's."""
        return (
            self.config_fields.mean or self.family.mean,
            self.config_fields.std or self.family.std,
        )

    def assumptions(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Returns the values of fields of a config that nothing in the file says."""
        chosen = self.architecture(settings)
        values = {
            f"model.{field}": getattr(chosen, field)
            for field in self.family.assumed
            if field not in {*self.config_fields.fields, *settings}
        }
        for field in ("mean", "std"):
            if not getattr(self.config_fields, field):
                values[f"data.{field}"] = getattr(self.family, field)
        return {field: _spelled(value) for field, value in values.items()}

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
          model: The model whose variables are returned.
          allow_missing: See `fill`.
          backbone_only: Whether to convert only the backbone.
          allow_nonfinite: See `fill`.

        Raises:
          UserError: See `fill`. The message says also which architecture or settings would fit.
        """
        why = {name: self.family.why_dropped(name, model, backbone_only) for name in self.arrays}
        variables, report = fill(
            model,
            self.family.slots(model, backbone_only=backbone_only),
            {name: array for name, array in self.arrays.items() if not why[name]},
            source="the file's backbone" if backbone_only else "the file",
            allow_missing=allow_missing,
            allow_nonfinite=allow_nonfinite,
            hints=lambda: [
                *self._hints(model.architecture, backbone_only, allow_missing is not None),
                *(f"  {note}" for note in self.notes),
            ],
        )
        dropped = ((self.file_names.get(n, n), reason) for n, reason in why.items() if reason)
        report = dataclasses.replace(
            report,
            used=tuple((self.file_names.get(n, n), ours) for n, ours in report.used),
            dropped=(*dropped, *self.ignored),
            notes=(*self.notes, *report.notes),
        )
        return Converted(variables, report)

    def _hints(self, ours: Architecture, backbone_only: bool, is_run: bool) -> list[str]:
        """Returns a line on the architecture or the settings that fit the file better than ours."""
        try:
            found = self.architecture()
        except UserError as error:
            return [f"  {error}"]
        agree = f"{self._agreement(found, backbone_only):.0%} of the arrays agree"
        if not is_run:
            return [f"  {agree} with {found.name}, the nearest"]
        nearest = f"  it is nearest to {found.name}"
        # Families with the same backbone are equal here.
        if found.name != ours.name and not (backbone_only and found.backbone == ours.backbone):
            return [f"{nearest} ({agree}): `--config.model.architecture={found.name}`"]
        fields = _BACKBONE_FIELDS if backbone_only else (*_BACKBONE_FIELDS, *_HEAD_FIELDS)
        values = {f: getattr(found, f) for f in fields if getattr(found, f) != getattr(ours, f)}
        fitting = dataclasses.replace(ours, **values, num_classes=found.num_classes)
        if values and self._agreement(fitting, backbone_only) == 1:
            flags = (f"`--config.model.{name}={_spelled(value)}`" for name, value in values.items())
            return [f"  it fits with {' '.join(flags)}"]
        return [
            f"{nearest} all the same ({agree}); if the file is meant to be partial, name what may "
            "be missing: `--config.init.allow_missing=REGEX`"
        ]

    def _agreement(self, chosen: Architecture, backbone_only: bool) -> float:
        """Returns the ratio of equal names and shapes to all on either side, 0..1."""
        model = FunctionalModel.of(chosen)
        slots = self.family.slots(model, backbone_only=backbone_only)
        known = {(name, slot.shape) for name, slot in slots.items()}
        found = {
            (name, shape)
            for name, shape in self._shapes.items()
            if not self.family.why_dropped(name, model, backbone_only)
        }
        return len(found & known) / max(1, len(found | known))


def recognise(
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    *,
    family: str = "",
    backbone_only: bool = False,
    notes: Sequence[str] = (),
) -> Recognised:
    """Finds the family of a file's arrays.

    Args:
      arrays: Arrays by the names in the file.
      config: What the file says beside its arrays.
      family: The name of the family, where names do not decide.
      backbone_only: Whether a backbone is enough, as in a classifier's file.
      notes: What was done to the file before.

    Raises:
      UserError: The arrays are not those of a known DeepLab. The message says what they are.
    """
    if family and family not in FAMILIES:
        raise UserError(
            f"unknown family {family!r}{did_you_mean(family, FAMILIES)}. Known: "
            f"{', '.join(FAMILIES)}"
        )
    if family == TIMM.name:
        raise UserError("timm's files are backbones: give the file as `--config.init.backbone`")
    named, unwrapping = unwrap(arrays)
    ignored: list[tuple[str, str]] = []
    inside = {} if _deeplabs(named) else _inner_models(named)
    if len(inside) == 1 and (backbone_only or "a DeepLabv3" in inside.values()):
        inner = f"{next(iter(inside))}."
        beside = [name for name in named if not name.startswith(inner)]
        ignored = [(name, f'is not under "{inner}", where the model is') for name in beside]
        named, more = unwrap(
            {n.removeprefix(inner): a for n, a in named.items() if n.startswith(inner)}
        )
        count = f"{len(beside)} arrays beside it are not read"
        unwrapping += [f'The model is under "{inner}"; {count}.', *more]
    notes = (*notes, *unwrapping)
    chosen = FAMILIES[family] if family else _family_of(named, backbone_only, notes)
    if family and not chosen.matches(named):
        raise UserError(f"--as {family}: the file does not have the names of {chosen.title}")
    renamed = dict(zip(chosen.rename(list(named)), named, strict=True))
    if len(renamed) != len(named):
        raise UserError(f"the file has arrays of two versions of {chosen.title}'s names")
    complete, completing = chosen.complete({new: named[old] for new, old in renamed.items()})
    said = [] if chosen is TORCHVISION else [f"Read as {chosen.title}."]
    return Recognised(
        chosen,
        complete,
        renamed,
        config or {},
        (*said, *notes, *completing),
        tuple(ignored),
    )


def _family_of(
    named: Mapping[str, np.ndarray], backbone_only: bool, notes: Sequence[str]
) -> Family:
    matching = _deeplabs(named)
    if len(matching) == 1:
        return matching[0]
    if len(matching) > 1:
        titles = " and ".join(family.title for family in matching)
        raise UserError(
            f"the file has the names of two models, {titles}: save the arrays of one, or choose by "
            f"--as {' or --as '.join(family.name for family in matching)}"
        )
    if backbone_only:
        for family in (SMP, HF, TF):
            if any_begins(named, family.backbone):
                return family
        has_resnet = any_begins(named, "layer1.0.conv1.", "backbone.layer1.0.conv1.")
        if has_resnet and any_begins(named, "stem.", "backbone.stem.", "decode_head"):
            return MMSEG
        if any_begins(named, "backbone.", "features.", "conv1.", "layer1.", "0."):
            return TORCHVISION
    raise UserError("\n  ".join([*_what_it_is(named, backbone_only), *notes]))


def _what_it_is(named: Mapping[str, np.ndarray], backbone_only: bool) -> list[str]:
    """Returns the lines of the error message for a file that is no known DeepLab."""
    counts = collections.Counter(_first(name) for name in named)
    found = [f'"{first}" ({count} arrays)' for first, count in counts.items()]
    lines = [f"its names begin with {listed(found)}"]
    if inside := _inner_models(named):
        lines += [f'{kind} is under "{first}."' for first, kind in inside.items()]
        lines.append(
            "save the arrays of one, for example: `torch.save({name.removeprefix(prefix): value "
            "for name, value in state_dict.items() if name.startswith(prefix)}, FILE)`"
        )
    if backbone_only:
        known = "ResNets of torchvision, timm, mmsegmentation and smp, and MobileNetV2 and V3"
        return [f"the file has no known backbone: {known}", *lines]
    if len(inside) > 1:
        return ["the file holds more than one model", *lines]
    nearest = max(
        FAMILIES.values(),
        key=lambda family: sum(any_begins(named, *each) for each in family.signature),
    )
    lacking = [each[0] for each in nearest.signature if not any_begins(named, *each)]
    tasks = (
        task for *parts, task in _OTHER_TASKS if all(_any_matches(part, named) for part in parts)
    )
    task = next(tasks, "")
    headline = f"the file holds no DeepLabv3{f': it is {task}' if task else ''}"
    if lacking:
        headline += f"; nearest is {nearest.title}, of which it lacks {listed(lacking)}"
    usable = "a classifier, or another model with a known backbone, can be given as"
    if task:
        usable = "its backbone can be used: give the file as"
    if not task or _any_matches(_KNOWN_BACKBONE, named):
        lines.insert(0, f"{usable} `--config.init.backbone`")
    return [headline, *lines]


def unwrap(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Removes the prefixes that wrappers add to all names, and returns a note of each."""
    named, notes = dict(arrays), list[str]()
    for _ in range(_MAX_WRAPPERS):
        names = [name for name in named if name != _AVERAGED]
        prefix = f"{_first(names[0])}." if names else ""
        if not prefix or _TOP_MODULE.fullmatch(prefix[:-1]):
            break
        if not all(name.startswith(prefix) for name in names):
            break
        named = {name.removeprefix(prefix): array for name, array in named.items()}
        notes.append(f'All names began with "{prefix}", which a wrapper had added; removed.')
    return named, notes


def _inner_models(named: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns what is under each prefix that not all names have: "a DeepLabv3" or "a backbone"."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in named.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = array
    kinds = {}
    for first, group in groups.items():
        if _TOP_MODULE.fullmatch(first):
            continue
        inner, _ = unwrap(group)
        if _deeplabs(inner):
            kinds[first] = "a DeepLabv3"
        elif any_begins(inner, "backbone.", "features.", "layer1."):
            kinds[first] = "a backbone"
    return kinds


def _deeplabs(names: Iterable[str]) -> list[Family]:
    return [family for family in FAMILIES.values() if family.matches(names)]


def _any_matches(pattern: str, names: Iterable[str]) -> bool:
    return any(re.match(pattern, name) for name in names)


def _first(name: str) -> str:
    return name.partition(".")[0]


def _spelled(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
