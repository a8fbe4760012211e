"""Image files in, predictions of them as files out: what `deeplab-jax predict` does."""

from __future__ import annotations

import collections
import dataclasses
import glob
import io
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from deeplab_jax.data.io import images
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.files import write_bytes, write_png
from deeplab_jax.visualization import overlays as pictures

# How the names of outputs end, behind the name of the image.
IDS, OVERLAY, BESIDE = "_ids.png", "_overlay.png", "_side_by_side.png"
_OUTPUT = re.compile(r"(_ids|_overlay|_side_by_side|_heatmap_.+)\.png$")


@dataclasses.dataclass(frozen=True)
class Job:
    """An image to predict.

    Attributes:
      path: of the image.
      name: of its outputs, without ending, relative to their folder.
    """

    path: pathlib.Path
    name: pathlib.PurePath


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is written of each image.

    Attributes:
      folder: where to.
      opacity: of class colours over images, 0..1.
      heat: ids of the classes whose probabilities are drawn.
      beside: whether the image is drawn beside its overlay too.
    """

    folder: pathlib.Path
    opacity: float = 0.5
    heat: tuple[int, ...] = ()
    beside: bool = False


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What was predicted of an image.

    Attributes:
      path: of the image.
      size: its height and width, pixels.
      counts: pixels of each class.
      files: what was written, by kind.
    """

    path: pathlib.Path
    size: tuple[int, int]
    counts: Int[np.ndarray, " classes"]
    files: dict[str, pathlib.Path]


def find(arguments: Iterable[str], out: pathlib.Path) -> list[Job]:
    """The images that files, folders and patterns name, each once.

    Of a folder all image files below it are taken, with their folders kept in the outputs' names;
    hidden files, and outputs of an earlier time in `out`, are not. A file that is named is taken
    whether it is an image or not, and even if it is not there: predicting it tells.

    Args:
      arguments: paths and patterns of the shell, `**` included.
      out: folder of the outputs.

    Raises:
      UserError: a folder without images, or a pattern without files.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}  # path as given, and relative to its folder
    for argument in arguments:
        path = pathlib.Path(argument)
        if path.is_dir():
            inside = {file: file.relative_to(path) for file in _images_below(path, out)}
            if not inside:
                raise UserError(f"{argument}: the folder holds no image files")
        elif not path.exists() and glob.has_magic(argument):
            matches = map(pathlib.Path, sorted(glob.glob(argument, recursive=True)))
            inside = {file: pathlib.Path(file.name) for file in matches if file.is_file()}
            if not inside:
                raise UserError(f"{argument}: no file has such a name")
        else:
            inside = {path: pathlib.Path(path.name)}
        for file, relative in inside.items():
            found.setdefault(_absolute(file), relative)
    names = _distinct_names(list(found), list(found.values()))
    return [Job(path, name) for path, name in zip(found, names, strict=True)]


def _absolute(path: pathlib.Path) -> pathlib.Path:
    """Without `..`, so that one file is not taken twice; links stay, as their names count."""
    return pathlib.Path(os.path.abspath(path))


def _images_below(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    def is_output(file: pathlib.Path) -> bool:
        ours = _absolute(file).is_relative_to(_absolute(out))
        return ours and _OUTPUT.search(file.name) is not None

    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in images.SUFFIXES
        and not file.name.startswith(".")
        and file.is_file()
        and not is_output(file)
    )


def _distinct_names(
    paths: Sequence[pathlib.Path], relatives: Sequence[pathlib.Path]
) -> list[pathlib.PurePath]:
    """A name of its own for each: the stem; with its suffix, and then folders, where two agree."""
    names = [relative.with_suffix("") for relative in relatives]
    for depth in range(max((len(path.parts) for path in paths), default=0)):
        times = collections.Counter(names)
        if len(times) == len(names):
            break
        names = [
            name if times[name] == 1 else relative.parent / _longer(path, depth)
            for name, path, relative in zip(names, paths, relatives, strict=True)
        ]
    taken: set[pathlib.PurePath] = set()
    for place, name in enumerate(names):  # "a_b/c" and "a/b_c" are still the same
        while names[place] in taken:
            names[place] = name.with_name(f"{name.name}_{place}")
        taken.add(names[place])
    return list(names)


def _longer(path: pathlib.Path, depth: int) -> str:
    folders = path.parts[1:-1][-depth:] if depth else ()
    return "_".join([*folders, path.stem, *filter(None, [path.suffix.lstrip(".")])])


def class_id(text: str, labels: LabelSet) -> int:
    """The id of a class that is given by name, in whatever case, or by id.

    Raises:
      UserError: there is none, with the nearest name.
    """
    lower = [name.lower() for name in labels.names]
    if text.strip().lower() in lower:
        return lower.index(text.strip().lower())
    if text.strip().isdecimal() and int(text) < labels.num_classes:
        return int(text)
    raise UserError(
        f"there is no class {text!r}{did_you_mean(text, labels.names)}. The classes are "
        f"{', '.join(labels.names)}, and ids 0 to {labels.num_classes - 1} may be given too."
    )


def prepare_folder(folder: pathlib.Path) -> None:
    """Makes a folder, and sees that it can be written, before there is something to be lost.

    Raises:
      UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written to: {error.strerror}") from None


def predict(segmenter: Segmenter, job: Job, outputs: Outputs) -> Predicted:
    """Predicts an image and writes what is asked for; files of an earlier time are replaced.

    Raises:
      UserError: the file is no image, or does not fit into memory.
      OutputError: a file cannot be written.
    """
    image = segmenter.read(job.path)
    maps: dict[int, np.ndarray] = {}
    if outputs.heat:
        probabilities = segmenter.probabilities(image)
        ids = probabilities.argmax(axis=-1).astype(np.uint8)
        maps = {index: probabilities[..., index] for index in outputs.heat}
    else:
        ids = segmenter.predict(image).astype(np.uint8)
    try:
        files = _write(segmenter.labels, job, outputs, image, ids, maps)
    except OSError as error:
        raise OutputError(
            f"cannot write to {error.filename or outputs.folder}: {error.strerror or error}"
        ) from error
    counts = pictures.class_counts(ids, segmenter.labels.num_classes)
    return Predicted(job.path, (ids.shape[0], ids.shape[1]), counts, files)


class OutputError(UserError):
    """The outputs cannot be written: no other image would fare better."""


def _write(
    labels: LabelSet,
    job: Job,
    outputs: Outputs,
    image: UInt8[np.ndarray, "h w c"],
    ids: UInt8[np.ndarray, "h w"],
    maps: dict[int, np.ndarray],
) -> dict[str, pathlib.Path]:
    base = outputs.folder / job.name
    base.parent.mkdir(parents=True, exist_ok=True)
    files = {
        "ids": base.with_name(base.name + IDS),
        "overlay": base.with_name(base.name + OVERLAY),
    }
    write_ids(files["ids"], ids, labels)
    write_png(files["overlay"], pictures.overlay(image, ids, labels, opacity=outputs.opacity))
    if outputs.beside:
        files["side_by_side"] = base.with_name(base.name + BESIDE)
        beside = pictures.side_by_side(image, ids, labels, opacity=outputs.opacity)
        write_png(files["side_by_side"], beside)
    for index, probability in maps.items():
        name = labels.names[index]
        plain = re.sub(r"[^\w-]+", "_", name)
        file = base.with_name(
            f"{base.name}_heatmap_{plain}{'' if plain == name else f'_{index}'}.png"
        )
        write_png(file, pictures.heatmap(image, probability, name))
        files[f"heatmap {name}"] = file
    return files


def write_ids(path: pathlib.Path, ids: UInt8[np.ndarray, "h w"], labels: LabelSet) -> None:
    """Writes a palette PNG: its values are the ids, and it shows the classes' colours."""
    image = Image.fromarray(ids)
    image.putpalette(labels.palette().tobytes())  # an image of mode L becomes one of mode P
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def total_counts(predicted: Sequence[Predicted], labels: LabelSet) -> Int[np.ndarray, " classes"]:
    """Pixels of each class in all images together."""
    return sum((one.counts for one in predicted), start=np.zeros(labels.num_classes, np.int64))


def to_json(predicted: Sequence[Predicted], labels: LabelSet) -> dict[str, Any]:
    """Pixels and shares of the classes that occur: of each image, and of all together."""
    return {
        "images": [
            {
                "image": str(one.path),
                "height": one.size[0],
                "width": one.size[1],
                "classes": _areas(one.counts, labels),
                "files": {kind: str(file) for kind, file in one.files.items()},
            }
            for one in predicted
        ],
        "total": _areas(total_counts(predicted, labels), labels),
    }


def _areas(counts: np.ndarray, labels: LabelSet) -> dict[str, dict[str, Any]]:
    return {
        labels.names[index]: {
            "id": index,
            "pixels": int(count),
            "share": float(count / counts.sum()),
        }
        for index, count in enumerate(counts)
        if count
    }
