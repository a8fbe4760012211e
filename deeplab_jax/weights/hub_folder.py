"""Model folders as on Hugging Face's hub: `config.json` beside one or several weights files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np

from deeplab_jax.config.rules import type_problems
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.utils.paths import CALIBRATION
from deeplab_jax.weights import saved_model, torch_file
from deeplab_jax.weights.matching import fill, own_slots
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
    """Returns the weights files of a folder, or raises UserError if one is missing."""
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
    """Returns the names of the files that an index lists, or raises UserError."""
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
    """Reads the arrays and the config of a folder, or raises UserError; nothing is executed."""
    arrays: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    for file in map(torch_file.read_file, files(folder)):
        arrays, config, notes = arrays | file.arrays, config | file.config, notes + file.notes
    if (folder / CONFIG).is_file():
        config |= read_json(folder / CONFIG)
    if (folder / PREPROCESSOR).is_file():  # of transformers: mean and std
        config["preprocessor_config"] = read_json(folder / PREPROCESSOR)
    return WeightsFile(arrays, config, notes)


def is_ours(config: dict[str, Any]) -> bool:
    """Whether `write` wrote a config."""
    return config.get("library") == _OURS


def open_model(path: pathlib.Path) -> SavedModel | WeightsFile:
    """Returns a checkpoint's or folder's model of this package, or another codebase's weights."""
    if is_checkpoint(path):
        return saved_model.read(path)
    file = read_file_or_folder(path)
    return to_saved_model(path, file) if is_ours(file.config) else file


def to_saved_model(folder: pathlib.Path, file: WeightsFile) -> SavedModel:
    """Returns the model in a folder of this package, or raises UserError.

    Args:
      folder: The folder, or the weights file in it.
      file: What `read` returned for it; `is_ours` holds for its config.
    """
    folder = folder if folder.is_dir() else folder.parent
    if file.config.get("format") != _FORMAT:
        raise UserError(
            f"{folder / CONFIG} has format {str(file.config.get('format'))[:20]}, and this version "
            f"of deeplab_jax reads format {_FORMAT}: use the version that wrote it"
        )

    def read_variables() -> Variables:
        slots = own_slots(model)
        if other := [
            f"{name} is {array.dtype}, not {slots[name].dtype}"
            for name, array in file.arrays.items()
            if name in slots and array.dtype != slots[name].dtype
        ]:
            raise UserError(f"the arrays of {folder} do not fit its {CONFIG}: {listed(other)}")
        return fill(model, slots, file.arrays, source=f"{folder}", allow_nonfinite=True).variables

    try:
        info: dict[str, Any] = file.config["info"]
        saved = SavedModel(folder, info, read_variables)
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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object, or raises UserError."""
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it must hold a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return value


def copy_calibration(saved: SavedModel, folder: pathlib.Path) -> None:
    """Copies the calibration of a model of this package, if it has one, to a folder of its weights.

    Weights of another codebase may have been calibrated with other settings.
    """
    config, calibration = saved.path / CONFIG, saved.path / CALIBRATION
    is_own = is_checkpoint(saved.path) or (config.is_file() and is_ours(read_json(config)))
    if is_own and calibration.is_file():
        shutil.copyfile(calibration, folder / CALIBRATION)


def write(saved: SavedModel, folder: pathlib.Path) -> None:
    """Writes a model, with its calibration, into a new folder, for `read` and `to_saved_model`."""
    folder.mkdir()
    torch_file.write(
        folder / _WEIGHTS[0], {**saved.variables.params, **saved.variables.batch_stats}
    )
    config = {"library": _OURS, "format": _FORMAT, "info": saved.info}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    copy_calibration(saved, folder)
