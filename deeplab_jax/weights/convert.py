"""Conversion of whole checkpoints: torchvision's to ours and back."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from deeplab_jax.data import labels
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights import hub, saved_model, torch_file, torchvision

SUFFIXES = (".pth", ".pt", ".safetensors")
# torchvision's `SemanticSegmentation` transform, with which its published weights are evaluated.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESIZE = "shorter side to 520, bilinear, half-pixel centres"
_SIZE = (520, 520)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
      source: the file or folder that was read.
      destination: what was written.
      architecture: of the model.
      used: `(name in the source, name in the destination)` of each array.
      dropped: `(name in the source, why)` of each array that has no counterpart.
      notes: whatever else was done, a sentence each.
    """

    source: pathlib.Path
    destination: pathlib.Path
    architecture: Architecture
    used: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> Conversion:
    """Converts torchvision's weights to a checkpoint folder, or a checkpoint to such a file.

    Args:
      source: a `.pth` or `.safetensors` file of a torchvision DeepLabv3, a name under which
        torchvision publishes one (it is downloaded), or a checkpoint or workdir of ours.
      destination: a new folder; or, from a checkpoint of ours, a file with one of `SUFFIXES`.

    Raises:
      UserError: if the source does not fit a known architecture, with all that speaks against it;
        or the destination exists or cannot be written.
    """
    path = pathlib.Path(source)
    target = pathlib.Path(destination)
    if path.is_dir():
        return _to_file(path, target)
    return _to_folder(_weights_file(source), target)


def _to_folder(path: pathlib.Path, target: pathlib.Path) -> Conversion:
    if target.suffix in SUFFIXES:
        raise UserError(f"{path} is a file of weights: it is converted to a folder, not {target}")
    read = read_weights(path)
    folder = saved_model.write_model(target, read.model.variables, read.model.info)
    architecture = read.model.architecture
    return Conversion(path, folder, architecture, read.used, read.dropped, read.notes)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A file of torchvision's weights as a model of ours; the other fields are `Conversion`'s."""

    model: saved_model.SavedModel
    used: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def read_weights(path: pathlib.Path) -> Weights:
    """Reads a `.pth` or `.safetensors` file of a torchvision DeepLabv3, which has no class names:
    those of 21 classes are VOC's.

    Raises:
      UserError: if it does not fit a known architecture, with all that speaks against it.
    """
    file = torch_file.read_file(path)
    architecture = torchvision.architecture_of(file.arrays)
    converted = torchvision.to_model(file.arrays, FunctionalModel(architecture))
    classes = labels.VOC if architecture.num_classes == 21 else _numbered(architecture.num_classes)
    info = saved_model.describe(
        architecture, classes, mean=_MEAN, std=_STD, resize=_RESIZE, size=_SIZE
    )
    variables = Variables(converted.params, converted.batch_stats)
    report = converted.report
    notes = report.notes
    if file.entry:
        left = f"; not read: {', '.join(file.left)}" if file.left else ""
        notes = (f'The state dict was under "{file.entry}"{left}.', *notes)
    model = saved_model.SavedModel(path, variables, info)
    return Weights(model, report.used, report.dropped, notes)


def read_model(source: str | os.PathLike[str]) -> saved_model.SavedModel:
    """Reads a model from whatever holds one.

    Args:
      source: a workdir, of which the best checkpoint is read; a checkpoint's folder; a file of
        weights, see `read_weights`; or a name under which torchvision publishes one.

    Raises:
      UserError: if there is no model, or it cannot be read.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        return saved_model.read(path)
    return read_weights(_weights_file(source)).model


def _weights_file(source: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(source)
    if hub.is_name(str(source)):
        path = hub.fetch(str(source))
    if not path.is_file():
        raise UserError(
            f"{source} is neither a file of weights, nor a folder with a checkpoint, nor a name of "
            f"torchvision's: {', '.join(name for name in hub.FILES if name.startswith('deeplab'))}"
        )
    return path


def _to_file(path: pathlib.Path, target: pathlib.Path) -> Conversion:
    saved_model.find(path)
    if target.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is a checkpoint: it is converted to a file that ends in "
            f"{', '.join(SUFFIXES)}, not {target}"
        )
    if target.exists():
        raise UserError(f"{target} exists already; choose another place, or remove it first")
    saved = saved_model.read(path)
    arrays = torchvision.from_model(saved.variables)
    torch_file.write(target, arrays)
    architecture = saved.architecture
    theirs = [name for name in arrays if not name.endswith("num_batches_tracked")]
    ours = [*saved.variables.params, *saved.variables.batch_stats]
    used = tuple(zip(ours, theirs, strict=True))
    return Conversion(saved.path, target.absolute(), architecture, used, (), ())


def _numbered(count: int) -> labels.LabelSet:
    return labels.named(*(f"class {index}" for index in range(count)))
