"""torchvision's state dicts to the model's variables and back: two tables, strict both ways.

`_MODULES` says what torchvision calls each module, `_LEAVES` what it calls an array of a layer and
in which order its axes are. Around them stand the few facts about whole files: what may be dropped,
what a classifier is called inside a segmentation model, and what wrappers put before all names.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deeplab_jax.models.architecture import ARCHITECTURES, Architecture
from deeplab_jax.models.functional import Arrays, FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.state_dict import listed


class _Leaf(NamedTuple):
    """An array of a layer: its names, and the axes of ours in the order of theirs."""

    ours: str
    theirs: str
    axes: tuple[int, ...]


# Ours are told apart by name; theirs, where one name serves two kinds, by the number of axes.
_LEAVES = (
    _Leaf("kernel", "weight", (2, 3, 1, 0)),  # convolution: theirs out, in, row, column
    _Leaf("scale", "weight", (0,)),  # batch norm
    _Leaf("bias", "bias", (0,)),
    _Leaf("mean", "running_mean", (0,)),
    _Leaf("var", "running_var", (0,)),
)
# Our modules and theirs. A deep stem has timm's places.
_MODULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.stem\.0\.conv", "backbone.conv1"),
    (r"backbone\.stem\.0\.bn", "backbone.bn1"),
    (r"(backbone\.layer\d+\.\d+\.(?:conv|bn)\d)", r"\1"),
    (r"(backbone\.layer\d+\.\d+\.downsample)(?:\.conv)?", r"\1.0"),
    (r"(backbone\.layer\d+\.\d+\.downsample)\.bn", r"\1.1"),
    (r"(backbone\.final_bn)", r"\1"),  # none of theirs has it
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
# The parts of an inverted residual; theirs are numbered, leaving out those that are not there.
_BLOCK_PARTS = ("expand", "depthwise", "squeeze_excite", "project")
_BLOCK_PART = re.compile(r"backbone\.block(\d+)\.(\w+)(?:\.(\w+))?")
_BLOCK_LEAVES = {"conv": "0", "bn": "1", "fc1": "fc1", "fc2": "fc2"}

_LEAF_OF = {(leaf.ours, len(leaf.axes)): leaf for leaf in _LEAVES}
_THEIRS = frozenset(leaf.theirs for leaf in _LEAVES)

# Counts a batch norm's training batches; of use only where its momentum is None.
_COUNTER = "num_batches_tracked"

# What `DataParallel` and `torch.compile` put before all names.
_WRAPPERS = ("module.", "_orig_mod.")

_BACKBONE = "backbone."

# How torchvision's classifiers differ: ResNets put nothing before the names of the backbone.
_CLASSIFIER_BACKBONE = "features."  # of MobileNets
_CLASSIFIER_HEADS = ("fc.", "classifier.")  # of ResNets, of MobileNets

_AUX = "aux_classifier."
_ASPP = "classifier.0.convs."
_LOGITS = ("classifier.4.", "aux_classifier.4.")  # the last layers: one output a class


@dataclasses.dataclass(frozen=True)
class Report:
    """What went where.

    Attributes:
      used: `(theirs, ours)`, the name in the file and in the model, for each array converted.
      dropped: `(theirs, why)` for each array of the file that has no use in the model.
      replaced: arrays of the model that start anew because the numbers of classes differ.
      missing: arrays of the model that the file lacks, as was allowed.
      notes: whatever else was done, a sentence each.
    """

    used: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]
    replaced: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


class Converted(NamedTuple):
    """Arrays of the model, without those that `report` calls replaced or missing."""

    params: Arrays
    batch_stats: Arrays
    report: Report


def to_model(
    arrays: Mapping[str, np.ndarray],
    model: FunctionalModel,
    *,
    allow_missing: str = "",
    backbone_only: bool = False,
) -> Converted:
    """A state dict's arrays as the model's variables.

    Every array of the file is used or has a known reason to be dropped; every variable of the
    model is filled once, from an array of its shape. What is allowed beside is reported: logits of
    another number of classes are left out, as is what `allow_missing` names.

    Args:
      arrays: by torchvision's names: of a segmentation model or, with `backbone_only`, of a
        classifier as well. Any floating type; they become the model's.
      model: what they are for.
      allow_missing: regular expression; variables of the model whose name it is found in may be
        absent from the file.
      backbone_only: take the backbone and nothing else.

    Raises:
      UserError: listing all arrays that are missing, left over or of another shape, and which
        known architecture the file is nearest to.
    """
    named, notes = _unwrapped(arrays)
    named, file_names = _as_segmentation(named, backbone_only)
    dropped = {name: _why_dropped(name, model, backbone_only) for name in named}
    wanted = _wanted(model, backbone_only)
    candidates = {name: array for name, array in named.items() if not dropped[name]}
    fit = _fit(candidates, wanted, _pattern(allow_missing))
    if fit.problems:
        raise UserError(_misfit(fit.problems, named, model, backbone_only))
    # Copies, also where an array could be used as it is: it may be a view of the file.
    converted = {
        want.ours: np.array(np.transpose(named[theirs], want.leaf.axes), want.dtype, order="C")
        for theirs, want in ((theirs, wanted[theirs]) for theirs in fit.used)
    }
    report = Report(
        used=tuple((file_names[theirs], wanted[theirs].ours) for theirs in fit.used),
        dropped=tuple((file_names[name], why) for name, why in dropped.items() if why),
        replaced=tuple(fit.replaced),
        missing=tuple(fit.missing),
        notes=(*notes, *_retyped((named[name].dtype, wanted[name].dtype) for name in fit.used)),
    )
    params, batch_stats = (
        {name: converted[name] for name in group if name in converted} for group in model.abstract
    )
    return Converted(params, batch_stats, report)


def from_model(variables: Variables) -> dict[str, np.ndarray]:
    """The state dict of the model's variables, as `load_state_dict(strict=True)` takes it.

    torchvision's model must be built with the same number of classes and with `aux_loss` where
    there is an auxiliary head. Batch norm's counters of batches are 0.

    Raises:
      UserError: a variable has no counterpart in PyTorch's layers.
    """
    arrays: dict[str, np.ndarray] = {}
    ours = variables.params | variables.batch_stats
    modules = _module_names(ours)
    for name, value in ours.items():
        leaf, module = _leaf(name, value), modules[_parent(name)]
        if leaf is None or module is None:
            raise UserError(
                f"{name} has no counterpart in torchvision's models: only architectures of the "
                "torchvision family can be written for it"
            )
        axes = np.argsort(leaf.axes)
        arrays[f"{module}.{leaf.theirs}"] = np.transpose(np.asarray(value), axes)
        if leaf.theirs == "running_var":
            arrays[f"{module}.{_COUNTER}"] = np.zeros((), np.int64)
    return arrays


def nearest(arrays: Mapping[str, np.ndarray], *, backbone_only: bool = False) -> tuple[str, float]:
    """The known architecture that most arrays fit, and the share of arrays that do, 0..1.

    The share counts names with their shapes, of those on either side. The auxiliary head and the
    number of classes do not count: they say nothing about the architecture.
    """
    named, _ = _as_segmentation(_unwrapped(arrays)[0], backbone_only)

    def counted(shapes: Mapping[str, tuple[int, ...]]) -> set[tuple[str, tuple[int, ...]]]:
        return {
            (name, () if name.startswith(_LOGITS) else shape)
            for name, shape in shapes.items()
            if (name.startswith(_BACKBONE) or not backbone_only) and not name.startswith(_AUX)
        }

    found = counted({n: array.shape for n, array in named.items() if _last(n) in _THEIRS})
    best, best_share = "", -1.0
    # torchvision's own come first: where only the backbone counts, families tie.
    for name in sorted(ARCHITECTURES, key=lambda name: not name.startswith("torchvision")):
        known = counted(_known(name))
        share = len(found & known) / len(found | known)
        if share > best_share:
            best, best_share = name, share
        if share == 1:
            break
    return best, best_share


def architecture_of(arrays: Mapping[str, np.ndarray]) -> Architecture:
    """The architecture of a segmentation model's state dict, with its number of classes and heads.

    It is the nearest one; whether all arrays fit it is for `to_model` to say.

    Raises:
      UserError: the arrays are not those of a segmentation model.
    """
    named, _ = _unwrapped(arrays)
    logits = named.get(f"{_LOGITS[0]}weight")
    if logits is None or logits.ndim != 4 or not any(map(_starts(_ASPP), named)):
        raise UserError(
            f"the file holds no DeepLabv3: it lacks {_ASPP}* or {_LOGITS[0]}weight. A classifier, "
            "or another model with a known backbone, can be given as `--config.init.backbone`"
        )
    name, _ = nearest(named)
    return dataclasses.replace(
        ARCHITECTURES[name],
        num_classes=logits.shape[0],
        aux_head=any(name.startswith(_AUX) for name in named),
    )


# Names and shapes


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(ours: str, value: Any) -> _Leaf | None:
    return _LEAF_OF.get((_last(ours), np.ndim(value)))


def _module_names(arrays: Iterable[str]) -> dict[str, str | None]:
    """What torchvision calls each module of a model; None where it has no such module."""
    modules = {_parent(name) for name in arrays}
    deep = "backbone.stem.2.conv" in modules
    return {
        module: (_DEEP_STEM.get(module) if deep else None) or _module_name(module, modules)
        for module in modules
    }


def _module_name(module: str, modules: set[str]) -> str | None:
    if match := _BLOCK_PART.fullmatch(module):
        number, part, leaf = match.groups()
        parts = {
            name.split(".")[2] for name in modules if name.startswith(f"backbone.block{number}.")
        }
        place = [each for each in _BLOCK_PARTS if each in parts].index(part)
        return f"backbone.{number}.block.{place}.{_BLOCK_LEAVES[leaf]}"
    for pattern, theirs in _MODULES:
        if match := re.fullmatch(pattern, module):
            return match.expand(theirs)
    return None


class _Wanted(NamedTuple):
    """A variable of the model: our name, and the shape and type that its array must get."""

    ours: str
    leaf: _Leaf
    shape: tuple[int, ...]  # in torchvision's order of axes
    dtype: np.dtype[Any]


def _wanted(model: FunctionalModel, backbone_only: bool) -> dict[str, _Wanted]:
    """The variables of the model that a file must fill, by torchvision's names."""
    wanted = {}
    variables = model.abstract.params | model.abstract.batch_stats
    modules = _module_names(variables)
    for name, value in variables.items():
        if backbone_only and not name.startswith(_BACKBONE):
            continue
        # What has no counterpart is wanted under its own name, which no file has.
        leaf = _leaf(name, value) or _Leaf(_last(name), _last(name), tuple(range(value.ndim)))
        shape = tuple(value.shape[axis] for axis in np.argsort(leaf.axes))
        module = modules[_parent(name)] or _parent(name)
        wanted[f"{module}.{leaf.theirs}"] = _Wanted(name, leaf, shape, value.dtype)
    return wanted


@functools.cache
def _known(architecture: str) -> dict[str, tuple[int, ...]]:
    wanted = _wanted(FunctionalModel(ARCHITECTURES[architecture]), backbone_only=False)
    return {theirs: want.shape for theirs, want in wanted.items()}


# Whole files


def _unwrapped(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays without what a wrapper put before all their names, and a note of it."""
    named, notes = dict(arrays), []
    while prefix := next((p for p in _WRAPPERS if named and all(map(_starts(p), named))), None):
        named = {name.removeprefix(prefix): array for name, array in named.items()}
        notes.append(f'All names began with "{prefix}" (DataParallel or torch.compile); removed.')
    return named, notes


def _starts(prefix: str) -> Any:
    return lambda name: name.startswith(prefix)


def _as_segmentation(
    named: dict[str, np.ndarray], backbone_only: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays under the names of a segmentation model, and the names they had.

    A classifier of torchvision is a backbone with a head of its own behind it.
    """
    if any(name.startswith(_BACKBONE) for name in named):
        return named, {name: name for name in named}
    if not backbone_only and any(name.startswith(_CLASSIFIER_HEADS) for name in named):
        raise UserError(
            "the file holds a classifier, which has a backbone and no segmentation head: give it "
            "as `--config.init.backbone`"
        )
    theirs = {
        name
        if name.startswith(_CLASSIFIER_HEADS)
        else _BACKBONE + name.removeprefix(_CLASSIFIER_BACKBONE): name
        for name in named
    }
    return {name: named[old] for name, old in theirs.items()}, theirs


def _why_dropped(name: str, model: FunctionalModel, backbone_only: bool) -> str:
    """Why an array of the file has no use in the model; empty: it must have one."""
    if _last(name) == _COUNTER:
        return "counts batches, which nothing here reads"
    if backbone_only and not name.startswith(_BACKBONE):
        return "belongs to a head, and the backbone alone is taken"
    if name.startswith(_AUX) and not model.architecture.aux_head:
        return "belongs to the auxiliary head, which the model does without"
    return ""


def _pattern(allow_missing: str) -> re.Pattern[str] | None:
    try:
        return re.compile(allow_missing) if allow_missing else None
    except re.error as error:
        raise UserError(
            f"allow_missing must be a regular expression, got {allow_missing!r} ({error})"
        ) from error


@dataclasses.dataclass
class _Fit:
    used: list[str] = dataclasses.field(default_factory=list)  # their names
    replaced: list[str] = dataclasses.field(default_factory=list)  # ours, as are the missing
    missing: list[str] = dataclasses.field(default_factory=list)
    problems: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # by kind

    def problem(self, kind: str, what: str) -> None:
        self.problems.setdefault(kind, []).append(what)


def _fit(
    named: dict[str, np.ndarray],
    wanted: dict[str, _Wanted],
    allow_missing: re.Pattern[str] | None,
) -> _Fit:
    """Which array fills which variable, and all that speaks against it."""
    fit = _Fit()
    for theirs, want in wanted.items():
        array = named.get(theirs)
        if array is None:
            if allow_missing and allow_missing.search(want.ours):
                fit.missing.append(want.ours)
            else:
                fit.problem("missing from the file", theirs)
        elif array.shape != want.shape:
            if _differ_in_classes(theirs, array.shape, want.shape):
                fit.replaced.append(want.ours)
            else:
                what = f"{theirs} is {list(array.shape)}, the model's is {list(want.shape)}"
                fit.problem("of another shape", what)
        elif not _is_floating(array.dtype):
            fit.problem("of another type", f"{theirs} is {array.dtype}, not floating point")
        else:
            fit.used.append(theirs)
    for name in named.keys() - wanted.keys():
        fit.problem("in the file, but not in the model", name)
    return fit


def _differ_in_classes(theirs: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return theirs.startswith(_LOGITS) and len(shape) == len(expected) and shape[1:] == expected[1:]


def _is_floating(dtype: np.dtype[Any]) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def _retyped(types: Iterable[tuple[np.dtype[Any], np.dtype[Any]]]) -> list[str]:
    counts = collections.Counter((theirs.name, ours.name) for theirs, ours in types)
    return [
        f"{count} arrays were {theirs} and became {ours}."
        for (theirs, ours), count in counts.items()
        if theirs != ours
    ]


def _misfit(
    problems: dict[str, list[str]],
    named: dict[str, np.ndarray],
    model: FunctionalModel,
    backbone_only: bool,
) -> str:
    name = model.architecture.name
    lines = [f"the file does not fit {name}{' (its backbone)' if backbone_only else ''}:"]
    lines += [f"  {kind}: {listed(sorted(what), '; ')}" for kind, what in problems.items()]
    best, share = nearest(named, backbone_only=backbone_only)
    # Of a backbone alone the families cannot be told apart, nor does it matter.
    same_backbone = ARCHITECTURES[best].backbone == model.architecture.backbone
    if best != name and not (backbone_only and same_backbone):
        lines.append(
            f"  it is nearest to {best} ({share:.0%} of the arrays agree): "
            f"`--config.model.architecture={best}`"
        )
    elif all(what.startswith(_AUX) for whats in problems.values() for what in whats):
        lines.append("  it has no auxiliary head: `--config.model.aux_head=False`")
    else:
        lines.append(
            f"  it is nearest to {best} all the same ({share:.0%} of the arrays agree); if it "
            "should be partial, name what may be absent: `--config.init.allow_missing=REGEX`"
        )
    return "\n".join(lines)
