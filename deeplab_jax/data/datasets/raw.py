"""Data sets that are read from their files as published, without a preparation.

Loading a split matches file names and reads a few pairs. Other damaged files raise an error when
they are read.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import UInt8

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Dataset, Pair
from deeplab_jax.data.datasets.archives import Archive, find_archives
from deeplab_jax.data.datasets.file_source import FileSource
from deeplab_jax.data.io import masks
from deeplab_jax.data.labels import LabelSet, check_ignore_label
from deeplab_jax.utils.errors import UserError, raise_problems
from deeplab_jax.utils.files import find_files
from deeplab_jax.utils.paths import expand_home

_UNKNOWN = -1  # the class of an id that the data set does not have


@dataclasses.dataclass(frozen=True)
class RawDataset:
    """The files of a data set below its root. A mask is named as its image but for the suffix."""

    title: str  # in messages
    images: Mapping[str, str]  # folder of each split
    masks: Mapping[str, str]
    image_suffix: str  # end of the names of images
    mask_suffix: str
    archives: tuple[Archive, ...]  # whose URL may be a page that offers them
    class_of_id: Mapping[int, int]  # the class, or `labels.IGNORE`, of each id in masks
    read_labels: Callable[[pathlib.Path], LabelSet]  # from the root


def load(raw: RawDataset, config: DataConfig, split: str) -> Dataset:
    """Loads a split, in the order of file names; trainval is train, then val.

    Raises:
      UserError: files are missing, or one of the few pairs that are read is damaged.
    """
    check_ignore_label(raw.title, config.ignore_label)
    found = find_archives(raw.archives, config.root, "Unpack the archives there.")
    packed = [path.name for path in found.values() if path.is_file()]
    if packed:
        raise UserError(f"config.data.root: unpack {' and '.join(packed)} in {config.root}")
    root = expand_home(config.root)
    labels = raw.read_labels(root)
    parts = ("train", "val") if split == "trainval" else (split,)
    pairs = [pair for part in parts for pair in _match_files(raw, root, part)]
    table = np.full(256, _UNKNOWN, np.int16)
    table[list(raw.class_of_id)] = list(raw.class_of_id.values())
    source = FileSource(pairs, functools.partial(_read_label, table))
    source.check_samples()
    return Dataset(source, labels)


def _read_label(table: np.ndarray, path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
    ids = masks.read_ids(path)
    label = np.where((ids >= 0) & (ids < 256), table[ids & 255], _UNKNOWN)
    if (label == _UNKNOWN).any():
        values = ", ".join(map(str, np.unique(ids[label == _UNKNOWN])[:5]))
        known = ", ".join(map(str, np.flatnonzero(table != _UNKNOWN)))
        raise UserError(f"{path}: holds {values}, no id of this data set, which has {known}")
    return label.astype(np.uint8)


def _match_files(raw: RawDataset, root: pathlib.Path, split: str) -> list[Pair]:
    folder, masks_folder = root / raw.images[split], root / raw.masks[split]
    images = _find_files(folder, raw.image_suffix)
    masks = _find_files(masks_folder, raw.mask_suffix)
    if not images:
        raise UserError(f"{folder}: holds no *{raw.image_suffix}")
    raise_problems(
        f"{raw.title} {split}: images {folder}/NAME{raw.image_suffix} and masks "
        f"{masks_folder}/NAME{raw.mask_suffix} must have the same names",
        [
            f"{images[name]}: has no mask" if name in images else f"{masks[name]}: has no image"
            for name in sorted(images.keys() ^ masks.keys())
        ],
    )
    return [
        Pair(pathlib.PurePosixPath(name).name, images[name], masks[name], folder)
        for name in sorted(images)
    ]


def _find_files(folder: pathlib.Path, suffix: str) -> dict[str, pathlib.Path]:
    """Finds files at any depth; keys are the paths from the folder without the suffix."""
    return {
        path.relative_to(folder).as_posix().removesuffix(suffix): path
        for path in (find_files(folder) if folder.is_dir() else ())
        if path.name.endswith(suffix)
    }
