"""Conversion of torchvision's weights to checkpoints and back, and reading of either."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

from deeplab_jax.data import labels
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import require_writable
from deeplab_jax.utils.paths import required_path
from deeplab_jax.weights import hub, saved_model, torch_file, torchvision
from deeplab_jax.weights.matching import Converted, require_finite
from deeplab_jax.weights.saved_model import SavedModel

SUFFIXES = (".pth", ".pt", ".safetensors")
# torchvision's `SemanticSegmentation` transform, with which its published weights are evaluated.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESIZE = "shorter side to 520, bilinear, half-pixel centres"
_SIZE = (520, 520)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
      source: The file or folder that was read.
      destination: The folder or file that was written.
      architecture: The model's architecture.
      used: `(name in the source, name in the destination)` of each array.
      dropped: `(name in the source, reason)` of each array that has no counterpart.
      notes: What else was changed, one sentence each.
    """

    source: pathlib.Path
    destination: pathlib.Path
    architecture: Architecture
    used: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Conversion:
    """Converts torchvision's weights to a checkpoint folder, or a checkpoint to a weights file.

    Args:
      source: A `.pth` or `.safetensors` file of a torchvision DeepLabv3, the name of one that
        torchvision publishes (it is downloaded), or a checkpoint or workdir of this package.
      destination: A new folder; or, for a checkpoint, a new file with one of `SUFFIXES`.

    Raises:
      UserError: The source fits no known architecture, with the differences from the nearest; or
        the destination exists or cannot be written.
    """
    target = required_path(destination, "the destination")
    if target.exists():
        raise UserError(f"{target} exists already; choose another path, or remove it first")
    require_writable(target.absolute().parent, create=True)
    path = hub.find_weights(source)
    return _to_file(path, target) if path.is_dir() else _to_folder(path, target)


def read_model(source: str | os.PathLike[str]) -> SavedModel:
    """Reads a trained model; its arrays at the first use of `variables`, which may raise too.

    Args:
      source: A workdir, whose best checkpoint is read; a checkpoint's folder; a `.pth` or
        `.safetensors` file of a torchvision DeepLabv3; or the name of one that torchvision
        publishes (it is downloaded).

    Raises:
      UserError: There is no model, it cannot be read, or its weights are not finite.
    """
    path = hub.find_weights(source)
    if not path.is_dir():
        return _read_weights(path)[0]
    saved = saved_model.read(path)
    return dataclasses.replace(saved, read_variables=functools.partial(_read_finite, saved))


def _read_finite(saved: SavedModel) -> Variables:
    variables = saved.read_variables()
    require_finite(variables.params | variables.batch_stats, str(saved.path))
    return variables


def _read_weights(path: pathlib.Path) -> tuple[SavedModel, Callable[[], Converted]]:
    """Reads a torchvision DeepLabv3, and returns a function that converts its arrays too.

    The classes get VOC's names if there are 21, else numbers.
    """
    file = torch_file.read_file(path)
    architecture = _naming(path, torchvision.architecture_of, file.arrays, file.notes)
    model = FunctionalModel.of(architecture)
    to_model = functools.partial(torchvision.to_model, file.arrays, model, notes=file.notes)
    convert = functools.partial(_naming, path, to_model)
    num_classes = architecture.num_classes
    numbered = labels.named(*(f"class {index}" for index in range(num_classes)))
    info = saved_model.describe(
        architecture,
        labels.VOC if num_classes == labels.VOC.num_classes else numbered,
        mean=_MEAN,
        std=_STD,
        resize=_RESIZE,
        size=_SIZE,
    )
    return SavedModel(path, info, lambda: convert().variables), convert


def _naming(path: pathlib.Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function, and names the file in its UserError."""
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _to_folder(path: pathlib.Path, target: pathlib.Path) -> Conversion:
    if target.suffix in SUFFIXES:
        raise UserError(f"{path} is a weights file: it is converted to a folder, not {target}")
    model, convert = _read_weights(path)
    variables, report = convert()
    folder = saved_model.write_model(target, variables, model.info)
    return Conversion(path, folder, model.architecture, report.used, report.dropped, report.notes)


def _to_file(path: pathlib.Path, target: pathlib.Path) -> Conversion:
    saved_model.find_checkpoint(path)
    if target.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is a checkpoint: it is converted to a file that ends in "
            f"{', '.join(SUFFIXES)}, not {target}"
        )
    saved = read_model(path)
    arrays = torchvision.from_model(saved.variables)
    torch_file.write(target, arrays)
    torch_names = [name for name in arrays if not name.endswith("num_batches_tracked")]
    names = [*saved.variables.params, *saved.variables.batch_stats]
    used = tuple(zip(names, torch_names, strict=True))
    return Conversion(saved.path, target.absolute(), saved.architecture, used, (), ())
