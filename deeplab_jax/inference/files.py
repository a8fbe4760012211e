"""Names of image files and of their predictions, and what `deeplab-jax predict` reports."""

from __future__ import annotations

import collections
import dataclasses
import functools
import glob
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from deeplab_jax.data.io.images import SUFFIXES
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import find_files, is_own_picture, match_files
from deeplab_jax.utils.paths import is_bucket

# Suffixes by which arguments are videos, lower case.
VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv")
)
_OUTPUT = re.compile(
    r"(_ids|_overlay|_side_by_side|_unsure|_heatmap_.+)\.png$|_overlay\.(mp4|avi)$"
)


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """The prediction of one image.

    Attributes:
      size: height and width, pixels.
      counts: pixels of each class.
      files: the written files, or their addresses in a bucket, by kind.
      unsure: number of unsure pixels; None unless requested.
    """

    path: pathlib.Path
    size: tuple[int, int]
    counts: Int[np.ndarray, " classes"]
    files: dict[str, pathlib.Path | str]
    unsure: int | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class VideoResult(ImageResult):
    """The prediction of a video; `counts` are over all frames.

    Attributes:
      num_frames: that were predicted.
      rate: frames per second of the overlay.
      notes: how the overlay differs from the video.
    """

    num_frames: int
    rate: float
    notes: tuple[str, ...]


class OutputError(UserError):
    """The disk is full or read-only: the outputs of other images cannot be written either."""


def find_images(
    arguments: Iterable[str], out: str | os.PathLike[str]
) -> tuple[dict[pathlib.Path, pathlib.PurePath], int]:
    """Finds the images and videos that files, folders and patterns name, each once.

    Of a folder, all image files below it are taken that `find_files` finds, but no videos; the
    outputs' names keep its subfolders. What this package wrote is left out of folders and patterns.
    A file that is named is taken even if it is not an image or does not exist: predicting it raises
    the error. What is in a bucket is copied to this machine first.

    Returns:
      The name of the outputs of each image, without suffix, relative to `out`, by the image's path;
      and the number of pictures that are left out. No output has the path of an image.

    Raises:
      UserError: a folder contains no images, or a pattern matches no file.
    """
    # The real folder and the name of an image: its path, and its path relative to its argument.
    found: dict[pathlib.Path, tuple[pathlib.Path, pathlib.Path]] = {}
    own: set[pathlib.Path] = set()
    real_folder = functools.cache(os.path.realpath)
    for argument in map(_stage, arguments):
        path = pathlib.Path(argument)
        if os.path.isdir(path):
            files = sorted(find_files(path))
            images = [file for file in files if file.suffix.lower() in SUFFIXES]
            matches = {file: file.relative_to(path) for file in images}
            problem = "the folder contains no image files"
            if any(file.suffix.lower() in VIDEO_SUFFIXES for file in files):
                problem += f" (its videos: name them, or use a pattern such as '{argument}/*.mp4')"
        elif not os.path.exists(path) and glob.has_magic(argument):
            matches = {file: pathlib.Path(file.name) for file in match_files(argument)}
            problem = "no file matches the pattern"
        else:
            matches, problem = {path: pathlib.Path(path.name)}, ""
        outputs = {file for file in matches if problem and _is_own(file)}
        own |= outputs
        if len(outputs) == len(matches):
            but = f" but what deeplab-jax wrote ({len(outputs)})" if outputs else ""
            raise UserError(f"{argument}: {problem}{but}")
        for file, relative in matches.items():
            if file not in outputs:
                key = pathlib.Path(real_folder(file.parent), file.name)
                # Removes `..`, but keeps links, whose names are used.
                found.setdefault(key, (pathlib.Path(os.path.abspath(file)), relative))
    paths, relatives = zip(*found.values(), strict=True) if found else ((), ())
    if is_bucket(out):
        from deeplab_jax.buckets import staging

        out = staging.local_path(str(out))
    real_out = os.path.realpath(out)
    taken = {
        file.relative_to(real_out).with_name(_OUTPUT.sub("", file.name))
        for file in found
        if file.is_relative_to(real_out) and _OUTPUT.search(file.name)
    }
    return dict(zip(paths, _unique_names(paths, relatives, taken), strict=True)), len(own)


def _is_own(file: pathlib.Path) -> bool:
    """Whether this package wrote a picture, or a video with its areas beside it."""
    base = _OUTPUT.sub("", file.name)
    is_overlay = base != file.name and file.suffix in VIDEO_SUFFIXES
    return is_own_picture(file) or (is_overlay and file.with_name(f"{base}_areas.csv").exists())


def _stage(argument: str) -> str:
    """Copies images from a bucket; returns their local path or pattern, or a local argument."""
    if not is_bucket(argument):
        return argument
    from deeplab_jax.buckets import staging

    names = argument.split("/")
    suffixes = {*SUFFIXES, pathlib.PurePath(argument).suffix.lower()} - {""}
    depth = next((i for i, name in enumerate(names) if glob.has_magic(name)), len(names))
    folder = staging.stage(
        "/".join(names[:depth]),
        lambda name: not name or name.lower().endswith(tuple(suffixes)),
        title="images to segment",
    )
    return os.path.join(folder, *names[depth:])


def _unique_names(
    paths: Sequence[pathlib.Path],
    relatives: Sequence[pathlib.Path],
    taken: Iterable[pathlib.PurePath] = (),
) -> list[pathlib.PurePath]:
    """Names each file by its stem; files of one stem by suffix, then by more and more folders.

    No file gets a name in `taken`.
    """
    names = [relative.with_suffix("") for relative in relatives]
    taken = list(taken)
    for depth in range(max((len(path.parts) for path in paths), default=0)):
        times = collections.Counter([*names, *taken])
        if max(times.values()) == 1:
            break
        names = [
            name if times[name] == 1 else relative.parent / _long_name(path, depth)
            for name, path, relative in zip(names, paths, relatives, strict=True)
        ]
    # "a_b/c" and "a/b_c" still have the same name; some file systems ignore case.
    folded = {str(name).casefold() for name in taken}
    for index, name in enumerate(names):
        while str(names[index]).casefold() in folded:
            names[index] = name.with_name(f"{name.name}_{index}")
        folded.add(str(names[index]).casefold())
    return list(names)


def _long_name(path: pathlib.Path, depth: int) -> str:
    folders = path.parts[1:-1][-depth:] if depth else ()
    return "_".join([*folders, path.stem, *filter(None, [path.suffix.lstrip(".")])])


def total_counts(results: Sequence[ImageResult], labels: LabelSet) -> Int[np.ndarray, " classes"]:
    """Returns the pixels of each class in all images together."""
    return sum((result.counts for result in results), start=np.zeros(labels.num_classes, np.int64))


def to_json(results: Sequence[ImageResult], labels: LabelSet) -> dict[str, Any]:
    """Returns pixels and fractions of the classes that occur, for each file and in total."""
    report: dict[str, Any] = {"images": []}
    for one in results:
        found: dict[str, Any] = {
            "height": one.size[0],
            "width": one.size[1],
            "classes": _class_areas(one.counts, labels),
            "files": {kind: str(file) for kind, file in one.files.items()},
        }
        if one.unsure is not None:
            found["unsure"] = {"pixels": one.unsure, "share": one.unsure / math.prod(one.size)}
        if isinstance(one, VideoResult):
            about = {"frames": one.num_frames, "rate": one.rate, "notes": list(one.notes)}
            report.setdefault("videos", []).append({"video": str(one.path), **about, **found})
        else:
            report["images"].append({"image": str(one.path), **found})
    return report | {"total": _class_areas(total_counts(results, labels), labels)}


def _class_areas(counts: np.ndarray, labels: LabelSet) -> dict[str, dict[str, Any]]:
    return {
        name: {"id": index, "pixels": int(count), "share": float(count / counts.sum())}
        for index, (name, count) in enumerate(zip(labels.names, counts, strict=True))
        if count
    }
