"""Model folders as on Hugging Face's hub: `config.json` beside one or several weights files.

Reads this package's and other libraries'; writes this package's.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from deeplab_jax.config.rules import type_problems
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.weights import torch_file
from deeplab_jax.weights.saved_model import SavedModel
from deeplab_jax.weights.torch_file import WeightsFile

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_OURS = "deeplab-jax"
_FORMAT = 1  # of `config.json`; `info` in it has a format of its own
_INDEX = ".index.json"  # ends the name of a file that lists shards
# The weights of a folder are in the first of these that it has.
_WEIGHTS = tuple(
    name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX)
)
EXPECTED = "model.safetensors or pytorch_model.bin, or an index of shards such as " + _WEIGHTS[1]


@dataclasses.dataclass
class _Info:
    """The types of `SavedModel.info`."""

    format: int
    architecture: dict  # type: ignore[type-arg]
    registered_by: dict  # type: ignore[type-arg]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    input_size: tuple[int, ...]
    made_with: dict = dataclasses.field(default_factory=dict)  # type: ignore[type-arg]


def weights_name(names: Iterable[str]) -> str | None:
    """Returns which of a folder's files are the weights or their index; None if none is."""
    present = set(names)
    return next((name for name in _WEIGHTS if name in present), None)


def is_hub_folder(folder: pathlib.Path) -> bool:
    """Whether a folder has weights under one of the hub's names, and is no workdir."""
    names = {child.name for child in folder.iterdir()} if folder.is_dir() else set()
    return weights_name(names) is not None and "checkpoints" not in names


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether a path is a folder, and not one as on the hub."""
    return path.is_dir() and not is_hub_folder(path)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the weights files of a folder.

    Raises:
      UserError: There are none, a shard is missing, or the index is damaged.
    """
    name = weights_name(child.name for child in folder.iterdir())
    if name is None:
        raise UserError(f"{folder} is no folder as on the hub: it has no {EXPECTED}")
    names = shards(folder / name) if name.endswith(_INDEX) else [name]
    if missing := [each for each in names if not (folder / each).is_file()]:
        raise UserError(
            f"{folder} lacks {listed(missing)}: {len(missing)} of the {len(names)} files that "
            f"{name} lists. Download them into that folder too"
        )
    return [folder / each for each in names]


def shards(index: pathlib.Path) -> list[str]:
    """Returns the names of the files that an index lists.

    Raises:
      UserError: The index is damaged, or names files of another folder.
    """
    names = read_json(index).get("weight_map")
    names = set(map(str, names.values())) if isinstance(names, dict) else {}
    wrong = [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]
    if wrong or not names:
        raise UserError(f"{index}: weight_map must name files of the same folder: {listed(wrong)}")
    return sorted(names)


def read_file_or_folder(path: pathlib.Path) -> WeightsFile:
    """Reads a weights file, or a folder as on the hub, also by the name of the file in it."""
    if weights_name([path.name]) and (path.parent / CONFIG).is_file():
        path = path.parent
    return read(path) if path.is_dir() else torch_file.read_file(path)


def read(folder: pathlib.Path) -> WeightsFile:
    """Reads the arrays and the config of a folder; nothing in it is executed.

    Raises:
      UserError: As `files`, `torch_file.read_file` and `read_json`.
    """
    first, *others = map(torch_file.read_file, files(folder))
    arrays = first.arrays
    for each in others:
        arrays |= each.arrays
    config = dict(first.config)
    if (folder / CONFIG).is_file():
        config |= read_json(folder / CONFIG)
    if (folder / PREPROCESSOR).is_file():  # of transformers: mean and std
        config["preprocessor_config"] = read_json(folder / PREPROCESSOR)
    return dataclasses.replace(first, arrays=arrays, format="hub folder", config=config)


def is_ours(config: dict[str, Any]) -> bool:
    """Whether `write` wrote a config."""
    return config.get("library") == _OURS


def to_saved_model(folder: pathlib.Path, file: WeightsFile) -> SavedModel:
    """Returns the model in a folder of this package.

    Args:
      folder: The folder, or the weights file in it.
      file: What `read` returned for it; `is_ours` holds for its config.

    Raises:
      UserError: The config is damaged or of another version. So may the use of `variables`.
    """
    folder = folder if folder.is_dir() else folder.parent
    if file.config.get("format") != _FORMAT:
        raise UserError(
            f"{folder / CONFIG} has format {str(file.config.get('format'))[:20]}, and this version "
            f"of deeplab_jax reads format {_FORMAT}: use the version that wrote it"
        )
    try:
        info: dict[str, Any] = file.config["info"]
        saved = SavedModel(folder, info, lambda: _variables(folder, file.arrays, model))
        typed, architecture = _Info(**info), saved.architecture
        for problem in (*type_problems(typed, "info."), *type_problems(architecture, "")):
            raise TypeError(problem)
        model = FunctionalModel.of(architecture)
        labels = LabelSet(typed.classes, typed.palette)
        labels.palette()
        fits = (
            labels.num_classes == architecture.num_classes
            and len(typed.mean) == len(typed.std) == architecture.in_channels
            and all(abs(value) < 1e30 for value in (*typed.mean, *typed.std))  # no NaN either
            and len(typed.input_size) == 2
            and min(*typed.std, *typed.input_size) > 0
        )
        if not fits:
            raise ValueError("classes, mean, std or input_size do not fit the architecture")
    except Exception as error:  # whatever values cause that no model has
        raise UserError(f"{folder / CONFIG} describes no model: {error}") from error
    return saved


def _variables(
    folder: pathlib.Path, arrays: dict[str, np.ndarray], model: FunctionalModel
) -> Variables:
    expected = model.abstract.params | model.abstract.batch_stats
    kinds, found = (
        {(name, array.shape, array.dtype) for name, array in each.items()}
        for each in (expected, arrays)
    )
    if wrong := sorted({name for name, *_ in kinds ^ found}):
        raise UserError(
            f"the arrays of {folder} do not fit its {CONFIG}: {listed(wrong)} (missing, not in the "
            "model, or of another shape or type)"
        )
    params, batch_stats = (
        {name: np.array(arrays[name]) for name in group} for group in model.abstract
    )
    return Variables(params, batch_stats)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: The file cannot be read, or holds anything else.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it must hold a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return value


def write(saved: SavedModel, folder: pathlib.Path) -> None:
    """Writes a model into a new folder, for `read` and `to_saved_model`.

    Raises:
      UserError: The weights cannot be written.
      OSError: The folder or the config cannot be written.
    """
    folder.mkdir()
    torch_file.write(
        folder / _WEIGHTS[0], {**saved.variables.params, **saved.variables.batch_stats}
    )
    config = {"library": _OURS, "format": _FORMAT, "info": saved.info}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
