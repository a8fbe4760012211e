"""torchvision's state dicts to a model's variables and back, strictly in both directions.

`_MODULES` maps the names of modules and `_LEAVES` the names and axes of a layer's arrays. The rest
handles whole files: arrays that may be dropped, classifiers, and prefixes that wrappers add.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.models.architecture import ARCHITECTURES, Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.weights.matching import (
    ConversionReport,
    Converted,
    Slot,
    match_arrays,
    problem_lines,
    to_variables,
)


class _Leaf(NamedTuple):
    """An array of a layer: its name here and in PyTorch, and PyTorch's axes in our order."""

    name: str
    torch_name: str
    axes: tuple[int, ...]


# PyTorch's "weight" is a kernel or a scale, depending on its number of axes.
_LEAVES = (
    _Leaf("kernel", "weight", (2, 3, 1, 0)),  # PyTorch's axes: out, in, row, column
    _Leaf("scale", "weight", (0,)),  # batch norm
    _Leaf("bias", "bias", (0,)),
    _Leaf("mean", "running_mean", (0,)),
    _Leaf("var", "running_var", (0,)),
)
# Modules of this package and of torchvision. A deep stem has timm's names.
_MODULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.stem\.0\.conv", "backbone.conv1"),
    (r"backbone\.stem\.0\.bn", "backbone.bn1"),
    (r"(backbone\.layer\d+\.\d+\.(?:conv|bn)\d)", r"\1"),
    (r"(backbone\.layer\d+\.\d+\.downsample)(?:\.conv)?", r"\1.0"),
    (r"(backbone\.layer\d+\.\d+\.downsample)\.bn", r"\1.1"),
    (r"(backbone\.final_bn)", r"\1"),  # torchvision has none
    (r"classifier\.aspp\.branches\.(\d+)\.conv", r"classifier.0.convs.\1.0"),
    (r"classifier\.aspp\.branches\.(\d+)\.bn", r"classifier.0.convs.\1.1"),
    (r"classifier\.aspp\.branches\.(\d+)\.project\.conv", r"classifier.0.convs.\1.1"),
    (r"classifier\.aspp\.branches\.(\d+)\.project\.bn", r"classifier.0.convs.\1.2"),
    (r"classifier\.aspp\.project\.conv", "classifier.0.project.0"),
    (r"classifier\.aspp\.project\.bn", "classifier.0.project.1"),
    (r"classifier\.head_conv\.conv", "classifier.1"),
    (r"classifier\.head_conv\.bn", "classifier.2"),
    (r"aux_classifier\.head_conv\.conv", "aux_classifier.0"),
    (r"aux_classifier\.head_conv\.bn", "aux_classifier.1"),
    (r"((?:aux_)?classifier)\.logits", r"\1.4"),
    # MobileNetV3.
    (r"backbone\.stem\.conv", "backbone.0.0"),
    (r"backbone\.stem\.bn", "backbone.0.1"),
    (r"backbone\.last\.conv", "backbone.16.0"),
    (r"backbone\.last\.bn", "backbone.16.1"),
)
_DEEP_STEM = {
    **{f"backbone.stem.{i}.conv": f"backbone.conv1.{3 * i}" for i in range(3)},
    **{f"backbone.stem.{i}.bn": f"backbone.conv1.{3 * i + 1}" for i in range(2)},
    "backbone.stem.2.bn": "backbone.bn1",
}
# The parts of an inverted residual block. torchvision numbers those that a block has.
_BLOCK_PARTS = ("expand", "depthwise", "squeeze_excite", "project")
_BLOCK_PART = re.compile(r"backbone\.block(\d+)\.(\w+)(?:\.(\w+))?")
_BLOCK_LEAVES = {"conv": "0", "bn": "1", "fc1": "fc1", "fc2": "fc2"}

_LEAF_OF = {(leaf.name, len(leaf.axes)): leaf for leaf in _LEAVES}
_TORCH_LEAVES = frozenset(leaf.torch_name for leaf in _LEAVES)

# Counts a batch norm's training batches; PyTorch uses it only if the norm's momentum is None.
_COUNTER = "num_batches_tracked"
# Counts the models of which `torch.optim.swa_utils.AveragedModel` holds the average.
_AVERAGED = "n_averaged"
_DROPPED = {
    _COUNTER: "counts batches, which nothing here reads",
    _AVERAGED: "counts averaged models, which nothing here reads",
}

# First parts of the names of models and backbones. Any other part that all names begin with was
# added by a wrapper: "module" by `DataParallel`, "_orig_mod" by `torch.compile`, "model" or "net"
# by a training script's own module.
_TOP_MODULE = re.compile(r"backbone|(?:aux_)?classifier|features|conv1|bn1|layer\d|fc|\d+")

_BACKBONE = "backbone."

# In torchvision's classifiers the backbone's names have this prefix (MobileNets) or none (ResNets).
_CLASSIFIER_BACKBONE = "features."
_CLASSIFIER_HEADS = ("fc.", "classifier.")  # of ResNets and MobileNets

_AUX = "aux_classifier."
_BLOCK_CONV = re.compile(r"backbone\.layer\d\.\d+\.conv\d\.weight")
_ASPP = "classifier.0.convs."
_LOGITS = ("classifier.4.", "aux_classifier.4.")  # the last layers: one output per class


def to_model(
    arrays: Mapping[str, np.ndarray],
    model: FunctionalModel,
    *,
    allow_missing: str = "",
    backbone_only: bool = False,
    notes: Sequence[str] = (),
) -> Converted:
    """Converts a state dict's arrays to the model's variables.

    Every array is used or dropped for a known reason, and every variable is filled from one array
    of its shape. The report lists the exceptions: logits for another number of classes, and
    variables that `allow_missing` names.

    Args:
      arrays: Arrays by torchvision's names, of a segmentation model or, with `backbone_only`, also
        of a classifier. Any floating-point type; they are converted to the model's.
      model: The model to convert them for.
      allow_missing: Regular expression. Variables in whose name it is found may be missing.
      backbone_only: Whether to convert only the backbone.
      notes: What was done to the file before, for the report and for error messages.

    Raises:
      UserError: Arrays are missing, left over or of another shape. The message lists them all and
        names the known architecture nearest to the file. Or weights are not finite.
    """
    unwrapped, unwrapping = _unwrapped(arrays)
    notes = (*notes, *unwrapping)
    named, file_names = _as_segmentation(unwrapped, backbone_only)
    dropped = {name: _why_dropped(name, model, backbone_only) for name in named}
    kept = {name: array for name, array in named.items() if not dropped[name]}
    used, replaced, missing, problems = match_arrays(
        kept, _slots(model, backbone_only), allow_missing
    )
    if problems:
        lines = _mismatch(problems, named, model, backbone_only) + _wrapped_models(unwrapped)
        raise UserError("\n".join([*lines, *(f"  {note}" for note in notes)]))
    report = ConversionReport(
        used=tuple((file_names[name], slot.name) for name, slot in used.items()),
        dropped=tuple((file_names[name], why) for name, why in dropped.items() if why),
        replaced=replaced,
        missing=missing,
        notes=(*notes, *_type_notes((kept[name].dtype, slot.dtype) for name, slot in used.items())),
    )
    return Converted(to_variables(kept, used, model), report)


def from_model(variables: Variables) -> dict[str, np.ndarray]:
    """Returns the state dict of the model's variables, for `load_state_dict(strict=True)`.

    torchvision's model must be built with the same number of classes, and with `aux_loss` if there
    is an auxiliary head. Batch norm's counters of batches are 0.

    Raises:
      UserError: A variable has no counterpart in PyTorch's layers.
    """
    arrays: dict[str, np.ndarray] = {}
    named = variables.params | variables.batch_stats
    modules = _module_names(named)
    for name, value in named.items():
        leaf, module = _leaf(name, value), modules[_parent(name)]
        if leaf is None or module is None:
            raise UserError(
                f"{name} has no counterpart in torchvision's models: only architectures of the "
                "torchvision family can be written in its format"
            )
        arrays[f"{module}.{leaf.torch_name}"] = np.transpose(
            np.asarray(value), np.argsort(leaf.axes)
        )
        if leaf.torch_name == "running_var":
            arrays[f"{module}.{_COUNTER}"] = np.zeros((), np.int64)
    return arrays


def nearest_architecture(
    arrays: Mapping[str, np.ndarray], *, backbone_only: bool = False
) -> tuple[str, float]:
    """Returns the known architecture that fits most arrays, and the ratio of arrays that fit, 0..1.

    The ratio is that of the names with equal shapes to all names on either side. The auxiliary head
    and the number of classes are left out, because they do not identify an architecture.
    """
    named, _ = _as_segmentation(_unwrapped(arrays)[0], backbone_only)

    def relevant(shapes: Mapping[str, tuple[int, ...]]) -> set[tuple[str, tuple[int, ...]]]:
        return {
            (name, () if name.startswith(_LOGITS) else shape)
            for name, shape in shapes.items()
            if (name.startswith(_BACKBONE) or not backbone_only) and not name.startswith(_AUX)
        }

    found = relevant({n: array.shape for n, array in named.items() if _last(n) in _TORCH_LEAVES})
    best, best_ratio = "", -1.0
    # The number in a ResNet's name counts the stem, these convolutions and the classifier.
    num_convs = len([name for name in named if _BLOCK_CONV.fullmatch(name)])
    likely = f"torchvision_resnet{num_convs + 2}" if num_convs else "torchvision_mobilenet_v3_large"
    # torchvision's own come first: families tie if only the backbone counts.
    order = {name: (name != likely, not name.startswith("torchvision")) for name in ARCHITECTURES}
    for name in sorted(order, key=lambda name: order[name]):
        known = relevant(_known_shapes(name))
        ratio = len(found & known) / len(found | known)
        if ratio > best_ratio:
            best, best_ratio = name, ratio
        if ratio == 1:
            break
    return best, best_ratio


def architecture_of(arrays: Mapping[str, np.ndarray], notes: Sequence[str] = ()) -> Architecture:
    """Returns the architecture of a segmentation model's state dict.

    It is the nearest known one, with the file's number of classes and heads. `to_model` checks
    whether all arrays fit it. The arguments are those of `to_model`.

    Raises:
      UserError: The arrays are not those of a DeepLabv3. The message says what they are.
    """
    named, unwrapping = _unwrapped(arrays)
    if not _is_deeplab(named):
        counts = collections.Counter(_first(name) for name in named)
        found = [f'"{first}" ({count} arrays)' for first, count in counts.items()]
        lines = [
            f"the file holds no DeepLabv3: it lacks {_ASPP}* or {_LOGITS[0]}weight. A classifier, "
            "or another model with a known backbone, can be given as `--config.init.backbone`",
            f"  its names begin with {listed(found)}",
            *_wrapped_models(named),
            *(f"  {note}" for note in (*notes, *unwrapping)),
        ]
        raise UserError("\n".join(lines))
    name, _ = nearest_architecture(named)
    return dataclasses.replace(
        ARCHITECTURES[name],
        num_classes=named[f"{_LOGITS[0]}weight"].shape[0],
        aux_head=any(name.startswith(_AUX) for name in named),
    )


# Names and shapes


def _first(name: str) -> str:
    return name.partition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str, value: Any) -> _Leaf | None:
    return _LEAF_OF.get((_last(name), np.ndim(value)))


def _module_names(variables: Iterable[str]) -> dict[str, str | None]:
    """Returns torchvision's name of each module of a model; None if it has no such module."""
    modules = {_parent(name) for name in variables}
    deep_stem = _DEEP_STEM if "backbone.stem.2.conv" in modules else {}
    return {module: deep_stem.get(module) or _module_name(module, modules) for module in modules}


def _module_name(module: str, modules: set[str]) -> str | None:
    if match := _BLOCK_PART.fullmatch(module):
        number, part, leaf = match.groups()
        parts = {
            name.split(".")[2] for name in modules if name.startswith(f"backbone.block{number}.")
        }
        index = [each for each in _BLOCK_PARTS if each in parts].index(part)
        return f"backbone.{number}.block.{index}.{_BLOCK_LEAVES[leaf]}"
    for pattern, torch_name in _MODULES:
        if match := re.fullmatch(pattern, module):
            return match.expand(torch_name)
    return None


def _slots(model: FunctionalModel, backbone_only: bool) -> dict[str, Slot]:
    """Returns the variables of the model that a file must fill, by torchvision's names."""
    slots = {}
    variables = model.abstract.params | model.abstract.batch_stats
    modules = _module_names(variables)
    for name, value in variables.items():
        if backbone_only and not name.startswith(_BACKBONE):
            continue
        # A variable without a counterpart gets its own name, which no file has.
        leaf = _leaf(name, value) or _Leaf(_last(name), _last(name), tuple(range(value.ndim)))
        shape = tuple(value.shape[axis] for axis in np.argsort(leaf.axes))
        module = modules[_parent(name)] or _parent(name)
        slots[f"{module}.{leaf.torch_name}"] = Slot(name, leaf.axes, shape, value.dtype)
    return slots


@functools.cache
def _known_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    slots = _slots(FunctionalModel.of(ARCHITECTURES[architecture]), backbone_only=False)
    return {name: slot.shape for name, slot in slots.items()}


# Whole files


def _unwrapped(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
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


def _is_deeplab(named: Mapping[str, np.ndarray]) -> bool:
    logits = named.get(f"{_LOGITS[0]}weight")
    return logits is not None and logits.ndim == 4 and any(n.startswith(_ASPP) for n in named)


def _wrapped_models(named: Mapping[str, np.ndarray]) -> list[str]:
    """Returns lines for an error message on the models under prefixes that not all names have."""
    lines = []
    for first in dict.fromkeys(map(_first, named)):
        inner, _ = _unwrapped(
            {n[len(first) + 1 :]: array for n, array in named.items() if _first(n) == first}
        )
        is_backbone = any(name.startswith(("backbone.", "features.", "layer1.")) for name in inner)
        if not _TOP_MODULE.fullmatch(first) and (_is_deeplab(inner) or is_backbone):
            kind = "a DeepLabv3" if _is_deeplab(inner) else "a backbone"
            lines.append(f'  {kind} is under "{first}."')
    if lines:
        lines.append(
            "  save the arrays of one, for example: `torch.save({name.removeprefix(prefix): value "
            "for name, value in state_dict.items() if name.startswith(prefix)}, FILE)`"
        )
    return lines


def _as_segmentation(
    named: dict[str, np.ndarray], backbone_only: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Renames the arrays as in a segmentation model, and returns their old names by the new.

    A classifier of torchvision is a backbone with another head.
    """
    if any(name.startswith(_BACKBONE) for name in named):
        return named, {name: name for name in named}
    if not backbone_only and any(name.startswith(_CLASSIFIER_HEADS) for name in named):
        raise UserError(
            "the file holds a classifier, which has a backbone and no segmentation head: give it "
            "as `--config.init.backbone`"
        )
    old_names = {
        name
        if name.startswith(_CLASSIFIER_HEADS)
        else _BACKBONE + name.removeprefix(_CLASSIFIER_BACKBONE): name
        for name in named
    }
    return {name: named[old] for name, old in old_names.items()}, old_names


def _why_dropped(name: str, model: FunctionalModel, backbone_only: bool) -> str:
    """Returns the reason why the model has no use for an array; empty if it has."""
    if _last(name) in _DROPPED:
        return _DROPPED[_last(name)]
    if backbone_only and not name.startswith(_BACKBONE):
        return "belongs to a head, and only the backbone is used"
    if name.startswith(_AUX) and not model.architecture.aux_head:
        return "belongs to the auxiliary head, which the model does not have"
    return ""


def _type_notes(types: Iterable[tuple[np.dtype[Any], np.dtype[Any]]]) -> list[str]:
    counts = collections.Counter((old.name, new.name) for old, new in types)
    return [
        f"{count} arrays were {old} and became {new}."
        for (old, new), count in counts.items()
        if old != new
    ]


def _mismatch(
    problems: dict[str, list[str]],
    named: dict[str, np.ndarray],
    model: FunctionalModel,
    backbone_only: bool,
) -> list[str]:
    name = model.architecture.name
    lines = [f"the file does not fit {name}{' (its backbone)' if backbone_only else ''}:"]
    lines += problem_lines(problems)
    best, ratio = nearest_architecture(named, backbone_only=backbone_only)
    # Families with the same backbone are equal here.
    same_backbone = ARCHITECTURES[best].backbone == model.architecture.backbone
    if best != name and not (backbone_only and same_backbone):
        lines.append(
            f"  it is nearest to {best} ({ratio:.0%} of the arrays agree): "
            f"`--config.model.architecture={best}`"
        )
    elif all(array.startswith(_AUX) for arrays in problems.values() for array in arrays):
        lines.append("  it has no auxiliary head: `--config.model.aux_head=False`")
    else:
        lines.append(
            f"  it is nearest to {best} all the same ({ratio:.0%} of the arrays agree); if the "
            "file is meant to be partial, name what may be missing: "
            "`--config.init.allow_missing=REGEX`"
        )
    return lines
