"""Recognising the family of a file, and saying what a file is that belongs to none.

Prefixes that wrappers add to all names are removed first. Only the names decide the family:
exactly one family's signature must match.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deeplab_jax.utils.errors import UserError, did_you_mean, listed
from deeplab_jax.weights.families.family import Family, any_match
from deeplab_jax.weights.families.mmseg import MMSEG
from deeplab_jax.weights.families.mobilenet_v2 import HF, TF
from deeplab_jax.weights.families.recognised import Recognised
from deeplab_jax.weights.families.smp import SMP
from deeplab_jax.weights.families.torchvision import TIMM, TORCHVISION
from deeplab_jax.weights.families.vainf import VAINF

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
_BACKBONE = r"backbone\.|features\.|conv1\.|layer\d\.|\d+\."
_MAX_WRAPPERS = 8
_AVERAGED = "n_averaged"  # of `torch.optim.swa_utils.AveragedModel`

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
    if inner := _only_model_inside(named, backbone_only):
        beside = [name for name in named if not name.startswith(inner)]
        ignored = [(name, f'is not under "{inner}", where the model is') for name in beside]
        inside = {n.removeprefix(inner): a for n, a in named.items() if n.startswith(inner)}
        named, more = unwrap(inside)
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
            if any_match(family.backbone, named):
                return family
        has_resnet = any_match(r"(?:backbone\.)?layer1\.0\.conv1\.", named)
        if has_resnet and any_match(r"(?:backbone\.)?stem\.|decode_head", named):
            return MMSEG
        if any_match(_BACKBONE, named):
            return TORCHVISION
    raise UserError("\n  ".join([*_what_it_is(named, backbone_only), *notes]))


def _what_it_is(named: Mapping[str, np.ndarray], backbone_only: bool) -> list[str]:
    """Returns the lines of the error message for a file that is no known DeepLab."""
    counts = collections.Counter(_first(name) for name in named)
    found = [f'"{first}" ({count} arrays)' for first, count in counts.items()]
    begin = f"its names begin with {listed(found)}"
    inside = _inner_models(named)
    hints = [f'{kind} is under "{first}."' for first, kind in inside.items()]
    if inside:
        hints.append(
            "save the arrays of one, for example: `torch.save({name.removeprefix(prefix): value "
            "for name, value in state_dict.items() if name.startswith(prefix)}, FILE)`"
        )
    if backbone_only:
        known = "ResNets of torchvision, timm, mmsegmentation and smp, and MobileNetV2 and V3"
        return [f"the file has no known backbone: {known}", begin, *hints]
    if len(inside) > 1:
        return ["the file holds more than one model", begin, *hints]
    # The family with most of its signature in the file, and among equals with most names alike.
    nearest = max(
        FAMILIES.values(),
        key=lambda each: (
            sum(any_match(part, named) for part in each.signature),
            sum(name.startswith(each.head_prefixes) for name in named),
        ),
    )
    lacking = [
        re.sub(r"\(\?:([^|)]*)[^)]*\)", r"\1", part).replace("\\", "").replace("[34]", "4")
        for part in nearest.signature
        if not any_match(part, named)
    ]
    tasks = (t for parts, t in _OTHER_TASKS if all(any_match(part, named) for part in parts))
    task = next(tasks, "")
    has_backbone = any_match(
        r"(?:backbone\.|encoder\.|features\.|mobilenet_v2\.)?\w*(?:layer1|conv_stem|0)\.", named
    )
    lines = [f"the file holds no DeepLabv3{f': it is {task}' if task else ''}"]
    if lacking:
        lines[0] += f"; nearest is {nearest.title}, of which it lacks {listed(lacking)}"
    if task and has_backbone:
        lines.append("its backbone can be used: give the file as `--config.init.backbone`")
    elif not task:
        lines.append(
            "a classifier, or another model with a known backbone, can be given as "
            "`--config.init.backbone`"
        )
    return [*lines, begin, *hints]


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
        if any(family.matches(inner) for family in FAMILIES.values()):
            kinds[first] = "a DeepLabv3"
        elif any(name.startswith(("backbone.", "features.", "layer1.")) for name in inner):
            kinds[first] = "a backbone"
    return kinds


def _only_model_inside(named: Mapping[str, np.ndarray], backbone_only: bool) -> str:
    """Returns the prefix of the only model in a file that has other arrays beside it, or ""."""
    if any(family.matches(named) for family in FAMILIES.values()):
        return ""
    kinds = _inner_models(named)
    if len(kinds) != 1 or not (backbone_only or "a DeepLabv3" in kinds.values()):
        return ""
    return f"{next(iter(kinds))}."


def _first(name: str) -> str:
    return name.partition(".")[0]
