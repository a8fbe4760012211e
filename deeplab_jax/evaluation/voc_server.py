"""Writes, checks and scores archives of results for the PASCAL VOC 2012 test server.

A `.tgz` holds `results/VOC2012/Segmentation/comp6_test_cls/<image id>.png` for each image of the
split: a palette PNG of class ids 0 to 20, of its image's size. Source: Everingham and Winn, "The
PASCAL Visual Object Classes Challenge 2012 Development Kit", section 5.3.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import pathlib
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from deeplab_jax import data as data_lib
from deeplab_jax.config import DataConfig
from deeplab_jax.data import statistics
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.io import images
from deeplab_jax.data.io.masks import write_ids
from deeplab_jax.data.labels import VOC
from deeplab_jax.evaluation.confusion import confusion_matrix
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.models.functional import Variables
from deeplab_jax.utils.errors import UserError, raise_problems
from deeplab_jax.utils.files import atomic_path

FOLDER = pathlib.PurePosixPath("results/VOC2012/Segmentation")
COMPETITIONS = {
    "comp5": "trained on VOC's own images alone",
    "comp6": "trained on other images too, such as ImageNet's",
}
SPLITS = ("test", "val", "train", "trainval")
_RESULTS = re.compile(rf"{FOLDER}/({'|'.join(COMPETITIONS)})_({'|'.join(SPLITS)})_cls")
_EXPECTED = f"{FOLDER}/comp6_test_cls/<image id>.png, or comp5, or another split"


@dataclasses.dataclass(frozen=True)
class Results:
    """The contents of an archive or folder of results.

    Attributes:
      competition, split: of `COMPETITIONS` and `SPLITS`.
      files: content of each PNG, by image id.
      problems: with other files in it.
    """

    path: pathlib.Path
    competition: str
    split: str
    files: dict[str, bytes]
    problems: tuple[str, ...]


def load_split(config: DataConfig, split: str) -> Dataset:
    """Loads a split of VOC; `test` has no labels. Raises UserError for other data sets."""
    if config.name != "voc":
        raise UserError(
            f"the server takes results for VOC 2012, but the data set is {config.name!r}: give "
            "--data voc and --root, the folder that holds VOCdevkit"
        )
    if split not in SPLITS:
        raise UserError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    if split != "test":
        return data_lib.load(config, split)
    from deeplab_jax.data.datasets import voc

    return voc.load_test(data_lib.stage(config))


def write(
    path: pathlib.Path,
    evaluator: Evaluator,
    variables: Variables,
    *,
    competition: str,
    split: str,
    progress: Callable[[], None] = lambda: None,
) -> Int[np.ndarray, "21 21"]:
    """Predicts a split and writes the archive (`.tgz`) for the server, after checking it.

    The evaluator's protocol must keep images at their own size. `progress` is called after each
    batch.

    Returns:
      Confusion matrix, counted from the files; zeros for the test split.

    Raises:
      UserError: the archive cannot be written, or the server would refuse it.
      RuntimeError: the files give another confusion matrix than the evaluator.
    """
    try:
        with (
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch,
            atomic_path(path) as archive,
        ):
            top = pathlib.Path(scratch)
            folder = top / FOLDER / f"{competition}_{split}_cls"
            folder.mkdir(parents=True)
            evaluation = evaluator.evaluate(
                variables,
                each=lambda one: write_ids(folder / f"{one.name}.png", one.ids, VOC),
                progress=progress,
            )
            assert evaluation is not None  # without `should_stop` it is complete
            _pack(top, archive)
            matrix = check(dataclasses.replace(read(archive), path=path), evaluator.dataset)
            if not np.array_equal(matrix, evaluation.matrix):
                raise RuntimeError(f"{path}: the files hold other ids than were evaluated")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return matrix


def _pack(top: pathlib.Path, archive: pathlib.Path) -> None:
    """Packs the folder `results` into a `.tgz`; the same files give the same bytes."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for file in sorted((top / FOLDER.parts[0]).rglob("*.png")):
            member = tarfile.TarInfo(file.relative_to(top).as_posix())
            content = file.read_bytes()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read(path: pathlib.Path) -> Results:
    """Reads the results in a `.tgz`, a `.tar`, or a folder that holds `results/`.

    Raises:
      UserError: the path cannot be read, or does not hold results of exactly one split.
    """
    files: dict[tuple[str, str], dict[str, bytes]] = {}
    problems = []
    for name, content in _entries(path):
        file = pathlib.PurePosixPath(name)
        kind = _RESULTS.fullmatch(str(file.parent))
        if kind is None or file.suffix != ".png":
            problems.append(f"{name}: is not expected; expected {_EXPECTED}")
            continue
        if content is None:
            problems.append(f"{name}: is not a regular file")
            continue
        contents = files.setdefault((kind[1], kind[2]), {})
        if file.stem in contents:
            problems.append(f"{name}: occurs twice")
        contents[file.stem] = content
    if len(files) != 1:
        state = "holds results of " + ", ".join(map("_".join, files)) if files else "has no results"
        more = f". The first of its files is {problems[0].split(':')[0]}" if problems else ""
        raise UserError(f"{path}: {state}; expected those of one split: {_EXPECTED}{more}")
    (((competition, split), contents),) = files.items()
    return Results(path, competition, split, contents, tuple(problems))


def _entries(path: pathlib.Path) -> Iterator[tuple[str, bytes | None]]:
    """Yields the name and content of each file; None for a link or a device."""
    if path.is_dir():
        for file in sorted((path / FOLDER.parts[0]).rglob("*")):
            if not file.is_dir():
                content = images.read_bytes(file) if file.is_file() else None
                yield file.relative_to(path).as_posix(), content
        return
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.isdir():
                    stream = tar.extractfile(member) if member.isreg() else None
                    yield member.name, stream.read() if stream else None
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as a .tgz of results ({error})") from None


def check(results: Results, dataset: Dataset) -> Int[np.ndarray, "21 21"]:
    """Checks that the server would accept results, and scores them if the split has labels.

    There must be exactly one file for each image of the split: a PNG of mode P with VOC's palette,
    of its image's size, with ids 0 to 20. Returns the confusion matrix over all images.

    Raises:
      UserError: there are problems; the message lists the first ones and counts all.
    """
    names: list[str] = []
    problems = list(results.problems)
    matrix = np.zeros((VOC.num_classes, VOC.num_classes), np.int64)

    def score(example: Example) -> tuple[str, str, np.ndarray | None]:
        name, label = example["name"], example["label"]
        try:
            ids = _ids(results.files.get(name), label.shape)
        except ValueError as error:
            return name, f"{name}.png: {error}", None
        return name, "", confusion_matrix(label, ids, VOC.num_classes)

    for name, problem, counts in statistics.map_examples(score, dataset, "Checking results"):
        names.append(name)
        if counts is None:
            problems.append(problem)
        else:
            matrix += counts
    unknown = sorted(results.files.keys() - set(names))
    problems += [f"{name}.png: {results.split} has no such image" for name in unknown]
    raise_problems(f"{results.path}", problems)
    return matrix


def _ids(content: bytes | None, size: tuple[int, ...]) -> UInt8[np.ndarray, "h w"]:
    """Decodes the ids of a file; raises ValueError if the server would refuse it."""
    if content is None:
        raise ValueError("is missing")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
    except Exception as error:  # Pillow raises what its decoder raises
        raise ValueError(f"is not a complete PNG ({type(error).__name__})") from error
    if image.mode != "P":
        raise ValueError(f"must be a palette PNG, mode P, got mode {image.mode}")
    palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)[: VOC.num_classes]
    if not np.array_equal(palette, VOC.palette()[: len(palette)]):
        raise ValueError("its palette is not VOC's")
    ids = np.asarray(image)
    if ids.shape != size:
        raise ValueError(
            f"is {ids.shape[1]} x {ids.shape[0]} pixels (width x height), its image "
            f"{size[1]} x {size[0]}"
        )
    if ids.max() >= VOC.num_classes:
        raise ValueError(f"holds the id {ids.max()}; the classes are 0 to {VOC.num_classes - 1}")
    return ids
