"""Conversion of other codebases' weights to checkpoints and back, and reading of either."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deeplab_jax.config import Config
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate
from deeplab_jax.config.schema import flatten
from deeplab_jax.data import labels
from deeplab_jax.data.io import classes as class_files
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import atomic_folder, require_writable
from deeplab_jax.utils.paths import is_bucket, required_path
from deeplab_jax.weights import families, hub, hub_folder, hugging_face, saved_model, torch_file
from deeplab_jax.weights.families.family import BACKBONE
from deeplab_jax.weights.matching import ConversionReport, Converted, require_finite
from deeplab_jax.weights.saved_model import SavedModel
from deeplab_jax.weights.torch_file import SUFFIXES


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
      source: The file or folder that was read.
      destination: The folder or file that was written, or its URL.
      architecture: The model's architecture.
      used: `(name in the source, name in the destination)` of each array.
      dropped: `(name in the source, reason)` of each array that has no counterpart.
      notes: What else was found and changed, one sentence each.
    """

    source: pathlib.Path
    destination: pathlib.Path | str
    architecture: Architecture
    used: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a weights file is read, where the file itself leaves a choice.

    Attributes:
      family: A key of `families.FAMILIES`; empty: the family that the names tell.
      settings: FIELD=VALUE texts for fields `model.*`, `data.mean` and `data.std` of a config,
        which replace what the file or the family's defaults say.
      classes: File of the names of the classes; empty: the file's own, VOC's if there are 21, or
        numbers.
      allow_nonfinite: Whether to keep NaN and infinite values instead of refusing them, also of a
        checkpoint.
    """

    family: str = ""
    settings: Sequence[str] = ()
    classes: str = ""
    allow_nonfinite: bool = False


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    family: str = "",
    settings: Sequence[str] = (),
    classes: str = "",
    allow_nonfinite: bool = False,
) -> Conversion:
    """Converts weights of another codebase to a checkpoint folder, or a checkpoint to a file.

    Args:
      source: A weights file or folder of a codebase that docs/weights.md lists, the name of
        published weights (they are downloaded), or a checkpoint or workdir of this package.
      destination: A new folder; for a checkpoint, a new file with one of `SUFFIXES`, or
        `hf://org/name`. Folder and file may be in a bucket.
      family: The codebase whose names are read or written, a key of `families.FAMILIES`. Default:
        read what the names tell; write that of the architecture.
      settings: See `Reading`.
      classes: See `Reading`.
      allow_nonfinite: See `Reading`.

    Raises:
      UserError: The source fits no known architecture, with the differences from the nearest; the
        model does not exist in the family to write; or the destination exists or cannot be written.
    """
    reading = Reading(family, settings, classes, allow_nonfinite)
    if hugging_face.is_remote(str(destination)):
        saved = read_model(source, reading)
        url = hugging_face.push(saved, str(destination))
        return Conversion(saved.path, url, saved.architecture, (), (), ())
    if is_bucket(destination):
        from deeplab_jax.buckets import outputs

        outputs.check(str(destination), str(destination), kind="new")
        with outputs.local_output(destination, checkpoint=True) as (path, _):
            done = convert(source, path, **vars(reading))
        return dataclasses.replace(done, destination=str(destination))
    target = required_path(destination, "the destination")
    if target.exists():
        raise UserError(f"{target} exists already; choose another path, or remove it first")
    require_writable(target.absolute().parent, create=True)
    path = hub.find_weights(source)
    if target.suffix in SUFFIXES:
        return _to_file(path, target, reading)
    return _to_folder(path, target, reading)


def read_model(source: str | os.PathLike[str], reading: Reading = Reading()) -> SavedModel:
    """Reads a trained model; its arrays at the first use of `variables`, which may raise too.

    Args:
      source: A workdir, whose best checkpoint is read; a checkpoint's folder; a weights file or a
        folder as on the hub, of this package or another codebase; or the name of published weights
        (they are downloaded).
      reading: How to read a file that leaves a choice.

    Raises:
      UserError: There is no model, it cannot be read, or its weights are not finite.
    """
    path = hub.find_weights(source)
    saved, _, notes = _open(path, reading)
    if notes:
        print(f"{path}:", *notes, file=sys.stderr, flush=True)
    return saved


def _of_this_package(saved: SavedModel, reading: Reading) -> SavedModel:
    """Returns a model that needs no conversion; weights are checked when they are read."""
    if reading.settings or reading.classes:
        raise UserError(
            f"{saved.path} describes itself: --set and --classes are for weights of others"
        )

    def read_variables() -> Variables:
        variables = saved.read_variables()
        if not reading.allow_nonfinite:
            require_finite(variables.params | variables.batch_stats, str(saved.path))
        return variables

    return dataclasses.replace(saved, read_variables=read_variables)


def _open(
    path: pathlib.Path, reading: Reading
) -> tuple[SavedModel, Callable[[], Converted], tuple[str, ...]]:
    """Returns a model, a function that reads it with a report, and notes on another codebase's."""
    file = hub_folder.open_model(path)
    if isinstance(file, SavedModel):
        ours = _of_this_package(file, reading)

        def read_ours() -> Converted:
            names = (*ours.variables.params, *ours.variables.batch_stats)
            return Converted(ours.variables, ConversionReport(tuple((n, n) for n in names)))

        return ours, read_ours, ()
    settings = _settings(reading.settings)
    of_model = {k.removeprefix("model."): v for k, v in settings.items() if k.startswith("model.")}
    with _naming(path):
        found = families.recognise(
            file.arrays, file.config, family=reading.family, notes=file.notes
        )
        names = found.config_fields.classes
        if "num_classes" not in of_model and found.shape_fields.fields["num_classes"] == 1:
            found = found.with_background(of_model)
            names = ("background", *(names or ("foreground",)))
            of_model["num_classes"] = 2
        architecture = found.architecture(of_model)
        classes = _labels(names, architecture.num_classes, reading.classes)
    assumed = [f"{k}={v}" for k, v in found.assumptions(of_model).items() if k not in settings]
    if assumed:
        note = f"Assumed {', '.join(assumed)}, as {found.family.title} has by default"
        notes = (*found.notes, f"{note}; `deeplab-jax convert` sets others by --set FIELD=VALUE.")
        found = dataclasses.replace(found, notes=notes)
    mean, std = (
        _per_channel(settings.get(field, value), architecture.in_channels)
        for field, value in zip(("data.mean", "data.std"), found.normalization(), strict=True)
    )
    info = saved_model.describe(
        architecture,
        classes,
        mean=mean,
        std=std,
        resize=found.family.resize,
        size=found.family.size,
    )

    def read() -> Converted:
        model = FunctionalModel.of(architecture)
        with _naming(path):
            return found.to_model(model, allow_nonfinite=reading.allow_nonfinite)

    notes = found.notes if found.family.name != "torchvision" else ()
    return SavedModel(path, info, lambda: read().variables), read, notes


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the values of settings for reading, by field."""
    names = [text.partition("=")[0] for text in texts]
    config = config_io.override(Config(), texts)
    validate(config)
    if max(config.data.mean + config.data.std) > 2:
        raise UserError("data.mean and data.std are of values 0..1: divide those of 0..255 by 255")
    for name in names:
        if not re.fullmatch(r"model\.(?!architecture$).*|data\.(mean|std)", name):
            raise UserError(
                f"--set {name}: a weights file is read with fields model.*, data.mean and data.std"
            )
    values = flatten(config)
    return {name: values[name] for name in names}


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Returns one value for each channel; the average of three if there is another number."""
    if len(values) == channels:
        return tuple(values)
    return (round(sum(values) / len(values), 6),) * channels


def _labels(names: Sequence[str], num_classes: int, path: str) -> LabelSet:
    """Returns the classes: those of a file, those with these names, VOC's, or numbers."""
    if path:
        found = class_files.read(required_path(path, "--classes")).labels
        if found.num_classes != num_classes:
            raise UserError(
                f"{path} names {found.num_classes} classes, but the model has {num_classes}"
            )
        return found
    if num_classes > labels.IGNORE:
        raise UserError(
            f"the model has {num_classes} classes: at most {labels.IGNORE} are supported, because "
            "labels are bytes"
        )
    if len({name for name in names if name.isprintable() and name.strip()}) != num_classes:
        if num_classes == labels.VOC.num_classes:
            return labels.VOC
        return labels.named(*(f"class {index}" for index in range(num_classes)))
    known = (each for each in labels.KNOWN if each.names == tuple(names))
    return next(known, labels.named(*names))


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Names a file in the UserErrors of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _to_folder(path: pathlib.Path, target: pathlib.Path, reading: Reading) -> Conversion:
    if hub_folder.is_checkpoint(path):
        saved_model.find_checkpoint(path)
        raise UserError(
            f"{path} is a checkpoint: it is converted to a file that ends in "
            f"{', '.join(SUFFIXES)}, not {target}"
        )
    saved, read, _ = _open(path, reading)
    variables, report = read()
    with atomic_folder(target) as partial:
        partial.rmdir()  # Orbax makes it
        saved_model.write_model(partial, variables, saved.info)
        hub_folder.copy_calibration(saved, partial)
    folder = target.absolute()
    return Conversion(path, folder, saved.architecture, report.used, report.dropped, report.notes)


def _to_file(path: pathlib.Path, target: pathlib.Path, reading: Reading) -> Conversion:
    if not path.is_dir():
        raise UserError(f"{path} is a weights file: it is converted to a folder, not {target}")
    saved = read_model(path, dataclasses.replace(reading, family=""))  # it is the one to write
    arrays = families.from_model(saved.variables, saved.architecture, reading.family)
    notes = families.loading_notes(saved, reading.family)
    torch_file.write(target, arrays)
    names = [*saved.variables.params, *saved.variables.batch_stats]
    if reading.family == "timm":
        names = [name for name in names if name.startswith(BACKBONE)]
    written = [name for name in arrays if not name.endswith("num_batches_tracked")]
    used = tuple(zip(names, written, strict=True))
    return Conversion(saved.path, target.absolute(), saved.architecture, used, (), notes)
