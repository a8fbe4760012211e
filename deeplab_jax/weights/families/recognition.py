"""Recognising the family of a file, and saying what a file is that belongs to none.

Prefixes that wrappers add to all names are removed first. The family follows from the names alone:
exactly one family's signature must match.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deeplab_jax.models.architecture import ARCHITECTURES, Architecture, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.utils.errors import UserError, did_you_mean, listed
from deeplab_jax.weights.families.family import Description, Family
from deeplab_jax.weights.families.mmseg import MMSEG
from deeplab_jax.weights.families.mobilenet_v2 import HF, TF
from deeplab_jax.weights.families.smp import SMP
from deeplab_jax.weights.families.torchvision import TIMM, TORCHVISION
from deeplab_jax.weights.families.vainf import VAINF
from deeplab_jax.weights.matching import Converted

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
# The first parts of the names of torchvision's and timm's backbones and classifiers.
_BACKBONE = re.compile(r"backbone\.|features\.|conv1\.|layer\d\.|\d+\.")
_AVERAGED = "n_averaged"  # of `torch.optim.swa_utils.AveragedModel`

# Fields that shapes tell, and that a config can set.
_BACKBONE_FIELDS = ("width", "stem", "shortcut")
_HEAD_FIELDS = ("aux_head", "head_channels", "separable_aspp")

# What names say of other tasks' files: regular expressions that some name must match, each.
_OTHER_TASKS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((r"decode_head\.c1_bottleneck\.",), "a DeepLabv3+ of mmsegmentation"),
    ((r"decode_head\.psp_modules\.",), "a PSPNet or UPerNet of mmsegmentation"),
    ((r"decode_head\.convs\.",), "an FCN of mmsegmentation"),
    ((r"decode_head\.",), "another model of mmsegmentation or transformers"),
    ((r"segmentation_head\.0\.", r"decoder\.blocks\."), "a U-Net of segmentation_models.pytorch"),
    ((r"segmentation_head\.0\.",), "another model of segmentation_models.pytorch"),
    ((r"backbone\.", r"classifier\.0\.weight", r"classifier\.4\."), "an FCN of torchvision"),
    ((r"backbone\.", r"classifier\.cbr\."), "an LR-ASPP of torchvision"),
    ((r"mobilenet_v2\.", r"classifier\.weight"), "a classifier of transformers"),
    ((r"(?:backbone\.)?(?:fc|classifier|head)\.", r"(?:conv1|features|stem)\."), "a classifier"),
    ((r"(?:backbone\.)?(?:conv1|stem)\.", r"(?:backbone\.)?layer1\."), "a backbone"),
    ((r"rpn\.|roi_heads\.|bbox_head\.",), "a detector"),
)


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

    def describe(self) -> Description:
        """Returns what names, shapes and config say of the model."""
        return self.family.describe(self._shapes(), self.config)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.arrays.items()}

    def architecture(self, settings: Mapping[str, Any] | None = None) -> Architecture:
        """Returns the architecture: from shapes and config, else the family's default.

        Args:
          settings: Fields of `Architecture` that override both.

        Raises:
          UserError: There is no such architecture, or a setting is invalid.
        """
        found = self.describe()
        if found.name not in ARCHITECTURES:
            raise UserError(
                f"the file is {self.family.title}'s with the backbone "
                f"{found.fields.get('backbone')}, which this family has not here"
            )
        fields = {field: value for field, value in found.fields.items() if field != "backbone"}
        return architecture(found.name, **{**self.family.defaults, **fields, **(settings or {})})

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the mean and std of the channels, 0..1: the config's, else the family's."""
        found = self.describe()
        return found.mean or self.family.mean, found.std or self.family.std

    def assumptions(self, settings: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Returns "field=value" of each field that nothing in the file says."""
        known = {*self.describe().fields, *(settings or {})}
        chosen = self.architecture(settings)
        values = {field: getattr(chosen, field) for field in self.family.assumed}
        return tuple(
            f"{field}={_spelled(value)}" for field, value in values.items() if field not in known
        )

    def to_model(
        self,
        model: FunctionalModel,
        *,
        allow_missing: str = "",
        backbone_only: bool = False,
        allow_nonfinite: bool = False,
    ) -> Converted:
        """Converts the arrays to a model's variables, see `Family.to_model`."""

        def explain(problems: Mapping[str, list[str]]) -> list[str]:
            return self._nearest(model, problems, backbone_only)

        converted = self.family.to_model(
            self.arrays,
            model,
            allow_missing=allow_missing,
            backbone_only=backbone_only,
            allow_nonfinite=allow_nonfinite,
            notes=self.notes,
            file_names=self.file_names,
            explain=explain,
        )
        report = converted.report
        report = dataclasses.replace(report, dropped=(*report.dropped, *self.ignored))
        return converted._replace(report=report)

    def _nearest(
        self, model: FunctionalModel, problems: Mapping[str, list[str]], backbone_only: bool
    ) -> list[str]:
        """Returns a line on the architecture that fits the file better than a model, or a hint."""
        name = model.architecture.name
        try:
            found = self.architecture()
        except UserError:
            return []
        ratio = self._agreement(found, backbone_only)
        agree = f"{ratio:.0%} of the arrays agree"
        # Families with the same backbone are equal here.
        same_backbone = found.backbone == model.architecture.backbone
        if found.name != name and not (backbone_only and same_backbone):
            option = f"`--config.model.architecture={found.name}`"
            return [f"  it is nearest to {found.name} ({agree}): {option}"]
        if settings := self._settings(found, model.architecture, backbone_only):
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
        fitting = dataclasses.replace(ours, **differing)
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
    unwrapped, unwrapping = unwrap(arrays)
    file_names, ignored = {name: name for name in unwrapped}, []
    inner = _only_model_inside(unwrapped)
    if inner:
        ignored = [
            (name, f'is not under "{inner}", where the model is')
            for name in unwrapped
            if not name.startswith(inner)
        ]
        unwrapped = {
            name.removeprefix(inner): array
            for name, array in unwrapped.items()
            if name.startswith(inner)
        }
        unwrapped, more = unwrap(unwrapped)
        unwrapping += [
            f'The model is under "{inner}"; {len(ignored)} arrays beside it are not read.'
        ]
        unwrapping += more
    notes = (*notes, *unwrapping)
    chosen = FAMILIES[family] if family else _family_of(unwrapped, backbone_only, notes)
    new_names = chosen.rename(list(unwrapped))
    named = dict(zip(new_names, unwrapped.values(), strict=True))
    file_names = dict(zip(new_names, unwrapped, strict=True))
    if chosen is not TORCHVISION:
        notes = (f"Read as {chosen.title}.", *notes)
    arrays, more_notes = chosen.complete(named)
    notes = (*notes, *more_notes)
    return Recognised(chosen, dict(arrays), file_names, config or {}, notes, tuple(ignored))


def _family_of(
    named: Mapping[str, np.ndarray], backbone_only: bool, notes: Sequence[str]
) -> Family:
    matching = [family for family in FAMILIES.values() if family.matches(named)]
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
            if any(re.match(family.backbone, name) for name in named):
                return family
        if any(re.match(r"(?:backbone\.)?stem\.|decode_head\.", name) for name in named):
            return MMSEG
        if any(_BACKBONE.match(name) for name in named):
            return TORCHVISION
    raise UserError("\n".join([*_what_it_is(named), *(f"  {note}" for note in notes)]))


def _what_it_is(named: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the lines of the error message for a file that is no known DeepLab."""
    counts = collections.Counter(_first(name) for name in named)
    found = [f'"{first}" ({count} arrays)' for first, count in counts.items()]
    # The family of whose signature most is there, and of those the one with most names alike.
    nearest = max(
        FAMILIES.values(),
        key=lambda each: (
            sum(any(re.match(part, name) for name in named) for part in each.signature),
            sum(name.startswith(each.head_prefixes) for name in named),
        ),
    )
    lacking = [
        part.replace("\\", "")
        for part in nearest.signature
        if not any(re.match(part, name) for name in named)
    ]
    task = next(
        (
            words
            for parts, words in _OTHER_TASKS
            if all(any(re.match(part, name) for name in named) for part in parts)
        ),
        "",
    )
    has_backbone = any(
        re.match(
            r"(?:backbone\.|encoder\.|features\.|mobilenet_v2\.)?\w*(?:layer1|conv_stem|0)\.", name
        )
        for name in named
    )
    lines = [
        f"the file holds no DeepLabv3: {f'it is {task}, ' if task else ''}nearest is "
        f"{nearest.title}, of which it lacks {listed(lacking)}"
    ]
    if task and has_backbone:
        lines.append("  its backbone can be used: give the file as `--config.init.backbone`")
    elif not task:
        lines.append(
            "  a classifier, or another model with a known backbone, can be given as "
            "`--config.init.backbone`"
        )
    return [*lines, f"  its names begin with {listed(found)}", *_models_inside(named)]


def unwrap(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Removes the prefixes that wrappers add to all names, and returns a note of each."""
    named, notes = dict(arrays), list[str]()
    while True:
        names = [name for name in named if name != _AVERAGED]
        prefix = f"{_first(names[0])}." if names else ""
        if not prefix or _TOP_MODULE.fullmatch(prefix[:-1]):
            return named, notes
        if not all(name.startswith(prefix) for name in names):
            return named, notes
        named = {name.removeprefix(prefix): array for name, array in named.items()}
        notes.append(f'All names began with "{prefix}", which a wrapper had added; removed.')


def _inner_models(named: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns what is under each prefix that not all names have: "a DeepLabv3" or "a backbone"."""
    kinds = {}
    for first in dict.fromkeys(map(_first, named)):
        if _TOP_MODULE.fullmatch(first):
            continue
        inner, _ = unwrap(
            {n[len(first) + 1 :]: array for n, array in named.items() if _first(n) == first}
        )
        if any(family.matches(inner) for family in FAMILIES.values()):
            kinds[first] = "a DeepLabv3"
        elif any(name.startswith(("backbone.", "features.", "layer1.")) for name in inner):
            kinds[first] = "a backbone"
    return kinds


def _only_model_inside(named: Mapping[str, np.ndarray]) -> str:
    """Returns the prefix of the only model in a file that has other arrays beside it, or ""."""
    if any(family.matches(named) for family in FAMILIES.values()):
        return ""
    kinds = _inner_models(named)
    if len(kinds) != 1 or "a DeepLabv3" not in kinds.values():
        return ""
    return f"{next(iter(kinds))}."


def _models_inside(named: Mapping[str, np.ndarray]) -> list[str]:
    """Returns lines for an error message on the models under prefixes that not all names have."""
    lines = [f'  {kind} is under "{first}."' for first, kind in _inner_models(named).items()]
    if lines:
        lines.append(
            "  save the arrays of one, for example: `torch.save({name.removeprefix(prefix): value "
            "for name, value in state_dict.items() if name.startswith(prefix)}, FILE)`"
        )
    return lines


def _first(name: str) -> str:
    return name.partition(".")[0]


def _spelled(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
