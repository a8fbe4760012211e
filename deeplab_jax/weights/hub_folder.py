"""Model folders as on Hugging Face's hub: `config.json` beside one or several weights files.

Reads those of this package, segmentation_models.pytorch, transformers and timm, and folders without
a config or with another's; writes this package's.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

import numpy as np

from deeplab_jax.data.labels import LabelSet
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.utils.files import atomic_folder
from deeplab_jax.weights import model_card, torch_file
from deeplab_jax.weights.matching import Slot, match_arrays, problem_lines, to_variables
from deeplab_jax.weights.saved_model import SavedModel
from deeplab_jax.weights.torch_file import WeightsFile

CONFIG = "config.json"
OURS = "deeplab-jax"
FORMAT = 1  # of `config.json`; `info` in it has a format of its own
_INDEX = ".index.json"  # ends the name of a file that lists shards
# The weights of a folder are in the first of these that it has.
_WEIGHTS = tuple(
    name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX)
)
EXPECTED = "model.safetensors or pytorch_model.bin, or an index of shards such as " + _WEIGHTS[1]
_MAX_JSON = 16 << 20  # bytes; an index of 100,000 arrays is smaller


# By the field that tells who wrote a config: the writer, and the field's values that can be a
# DeepLab or its backbone (empty: any).
_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "_model_class": ("segmentation_models.pytorch", ("DeepLabV3", "DeepLabV3Plus")),
    "model_type": ("transformers", ("mobilenet_v2",)),
    "architecture": ("timm", ()),
}


def _fields(types: dict[Any, str]) -> dict[str, Any]:
    return {name: hint for hint, names in types.items() for name in names.split()}


# The types of the fields that are used: of the configs in `_KINDS`, of timm's `pretrained_cfg`, and
# of this package's `info`.
_TYPES = _fields(
    {
        str: "_model_class encoder_name model_type architecture",
        int: "encoder_output_stride decoder_channels in_channels classes num_classes "
        "output_stride num_channels",
        float: "depth_multiplier layer_norm_eps",
        list[int]: "decoder_atrous_rates",
        list[str]: "architectures",
        dict[str, str]: "id2label",
        dict[str, object]: "aux_params pretrained_cfg",
    }
)
_TIMM_TYPES = _fields({list[float]: "mean std"})
_INFO_TYPES = _fields(
    {
        int: "format",
        str: "resize",
        list[int]: "input_size",
        list[float]: "mean std",
        list[str]: "classes",
        list[list[int]]: "palette",
        dict[str, str]: "registered_by",
        dict[str, object]: "architecture",
    }
)


def weights_name(names: Iterable[str]) -> str | None:
    """Returns which of a folder's files are the weights or their index; None if none is."""
    present = set(names)
    return next((name for name in _WEIGHTS if name in present), None)


def is_hub_folder(folder: pathlib.Path) -> bool:
    """Whether a folder has weights under one of the hub's names, and is no workdir."""
    names = {child.name for child in folder.iterdir()} if folder.is_dir() else set()
    return weights_name(names) is not None and "checkpoints" not in names


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the weights files of a folder.

    Raises:
      UserError: There are none, a shard is missing, or the index is damaged.
    """
    name = weights_name(child.name for child in folder.iterdir()) if folder.is_dir() else None
    if name is None:
        raise UserError(f"{folder} is no folder as on the hub: it has no {EXPECTED}")
    names = shards(folder / name) if name.endswith(_INDEX) else [name]
    if missing := [each for each in names if not (folder / each).is_file()]:
        raise UserError(
            f"{folder} lacks {listed(missing)}: {len(missing)} of the {len(names)} files that "
            f"{name} lists. Download them into that folder too, from where the others came"
        )
    return [folder / each for each in names]


def shards(index: pathlib.Path) -> list[str]:
    """Returns the names of the files that an index lists.

    Raises:
      UserError: The index is damaged.
    """
    names = read_json(index).get("weight_map")
    if not _has_type(names, dict[str, str]) or not names:
        raise UserError(f"{index}: weight_map must give a file's name for each array's")
    if wrong := [name for name in names.values() if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise UserError(f"{index}: weight_map must name files of the same folder: {listed(wrong)}")
    return sorted(set(names.values()))


def read(folder: pathlib.Path) -> WeightsFile:
    """Reads the arrays and the config of a folder; nothing in it is executed.

    Raises:
      UserError: As `files`, `torch_file.read_file` and `kind_of`.
    """
    parts = [(path, torch_file.read_file(path)) for path in files(folder)]
    config = dict(parts[0][1].config)
    if (folder / CONFIG).is_file():
        config |= read_json(folder / CONFIG)
    kind_of(config, folder)
    arrays: dict[str, np.ndarray] = {}
    for path, part in parts:
        if twice := list(arrays.keys() & part.arrays.keys()):
            raise UserError(f"{path} has arrays of another file of its index: {listed(twice)}")
        arrays |= part.arrays
    return dataclasses.replace(parts[0][1], arrays=arrays, format="hub folder", config=config)


def is_ours(config: dict[str, Any]) -> bool:
    """Whether `write` wrote a config."""
    return config.get("library") == OURS


def kind_of(config: dict[str, Any], folder: pathlib.Path) -> str:
    """Returns who wrote a config: `OURS`, a name in `_KINDS`, or an empty string if unknown.

    Args:
      config: The parsed `config.json`; empty if there is none.
      folder: The folder it is from, for the error message.

    Raises:
      UserError: A field has another type than its writer gives it, or the model is no DeepLab.
    """
    if is_ours(config):
        return OURS
    for field, (kind, values) in _KINDS.items():
        value = config.get(field)
        if value is None:
            continue
        if values and isinstance(value, str) and value not in values:
            raise UserError(
                f"{folder} is a model {value[:200]} of {kind}; of {kind}'s models, "
                f"{' and '.join(values)} can be read"
            )
        for fields, hints in ((config, _TYPES), (config.get("pretrained_cfg"), _TIMM_TYPES)):
            given = {name: each for name, each in (fields or {}).items() if each is not None}
            _check_types(given, {name: hints[name] for name in hints.keys() & given}, folder)
        return kind
    return ""


def to_saved_model(folder: pathlib.Path, file: WeightsFile) -> SavedModel:
    """Returns the model in a folder of this package.

    Args:
      folder: The folder.
      file: What `read` returned for it, of the kind `OURS`.

    Raises:
      UserError: The config is damaged or of another version. So may the use of `variables`.
    """
    if file.config.get("format") != FORMAT:
        raise UserError(
            f"{folder / CONFIG} has format {str(file.config.get('format'))[:20]}, and this version "
            f"of deeplab_jax reads format {FORMAT}: use the version that wrote it"
        )
    _check_types(file.config, {"info": dict[str, object]}, folder)
    info, known = file.config["info"], typing.get_type_hints(Architecture)
    _check_types(info, _INFO_TYPES, folder)
    given = info["architecture"]
    _check_types(given, {name: known[name] for name in known.keys() & given}, folder)
    saved = SavedModel(folder, info, lambda: _variables(folder, file.arrays, model))
    try:
        architecture = saved.architecture
        model = FunctionalModel.of(architecture)
        labels = LabelSet(tuple(info["classes"]), tuple(map(tuple, info["palette"])))
        labels.palette()
        fits = (
            labels.num_classes == architecture.num_classes
            and len(info["mean"]) == len(info["std"]) == architecture.in_channels
            and min(info["std"]) > 0
            and len(info["input_size"]) == 2
            and min(info["input_size"]) > 0
        )
        if not fits:
            raise ValueError("classes, mean, std or input_size do not fit the architecture")
    # The fields have the right types, but values that no model has.
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
        raise UserError(f"{folder / CONFIG} describes no model: {error}") from error
    return saved


def _variables(folder: pathlib.Path, arrays: dict[str, Any], model: FunctionalModel) -> Variables:
    slots = {
        name: Slot(name, tuple(range(value.ndim)), value.shape, value.dtype)
        for name, value in (model.abstract.params | model.abstract.batch_stats).items()
    }
    match = match_arrays(arrays, slots)
    problems = match.problems | ({"of other classes": [*match.replaced]} if match.replaced else {})
    if problems:
        lines = [f"the arrays of {folder} do not fit its {CONFIG}:", *problem_lines(problems)]
        raise UserError("\n".join(lines))
    return to_variables(arrays, match.used, model)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: The file cannot be read, is too large, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON + 1)
        if len(content) > _MAX_JSON:
            raise ValueError(f"it has more than {_MAX_JSON} bytes")
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError("it must hold a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return value


def _check_types(fields: dict[str, Any], hints: dict[str, Any], folder: pathlib.Path) -> None:
    for name, hint in hints.items():
        if not _has_type(value := fields.get(name), hint):
            kind = hint if typing.get_args(hint) else hint.__name__
            raise UserError(f"{folder / CONFIG}: {name} must be {kind}, got {str(value)[:50]!r}")


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has a type; tuples are lists there, and numbers are finite."""
    elements = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, kind) for kind in elements)
    kind = typing.get_origin(hint)
    if kind is dict:
        return isinstance(value, dict) and all(_has_type(v, elements[1]) for v in value.values())
    if kind in (list, tuple):
        return isinstance(value, list) and all(_has_type(v, elements[0]) for v in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e30
    return hint is object or type(value) is hint  # True is no number


# Writing


def write(saved: SavedModel, folder: pathlib.Path, *, name: str = "", license: str = "") -> None:
    """Writes a model as a folder that `read` and `to_saved_model` read, with a model card.

    The folder appears only when it is complete.

    Args:
      saved: The model.
      folder: Must not exist, or be empty.
      name: `hf://org/name` of the repository, for the card; empty: the folder.
      license: For the card; see `model_card.write`.

    Raises:
      UserError: The folder cannot be written; or as `model_card.write`.
    """
    config = {"library": OURS, "format": FORMAT, "info": saved.info}
    arrays = {**saved.variables.params, **saved.variables.batch_stats}
    try:
        with atomic_folder(folder) as partial:
            model_card.write(saved, partial, name=name or str(folder), license=license)
            torch_file.write(partial / _WEIGHTS[0], arrays)
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
