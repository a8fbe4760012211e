"""Data sets that are read where they were unpacked, as published: images, masks, a table of ids.

At the start names are matched and a few pairs are read; what is wrong within a file shows when it
is read.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels as label_sets
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.io import reading
from deeplab_jax.data.io.reading import Pair
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.utils.errors import UserError

_FIRST_LOOK = 4  # pairs, evenly spread
_FOREIGN = -1  # what an id that a data set does not have is mapped to


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a data set's files lie below its root.

    Attributes:
      title: what it is called.
      images: folder of each split's images.
      masks: folder of each split's masks; they have the images' names but for the ends.
      image_end: of the names of images.
      mask_end: of the names of masks.
      archives: files that hold them, as published.
      home: where the archives are.
    """

    title: str
    images: Mapping[str, str]
    masks: Mapping[str, str]
    image_end: str
    mask_end: str
    archives: tuple[str, ...]
    home: str


def load(
    layout: Layout,
    config: DataConfig,
    parts: Sequence[str],
    ids: Mapping[int, int],
    labels: LabelSet,
) -> Dataset:
    """Some splits of a data set, one after the other, each in the order of names.

    Args:
      layout: of the data set.
      config: its `root` and `ignore_label`.
      parts: splits of the layout.
      ids: the class, or `labels.IGNORE`, of each id that masks may hold.
      labels: of the classes.

    Raises:
      UserError: files are missing, or a pair among a few is damaged. Reading an example raises one
        if it is.
    """
    if config.ignore_label != label_sets.IGNORE:
        raise UserError(
            f"{layout.title}'s ignored pixels are mapped to {label_sets.IGNORE}: "
            f"config.data.ignore_label must be {label_sets.IGNORE}, got {config.ignore_label}"
        )
    root = root_of(layout, config)
    pairs = [pair for part in parts for pair in _pairs(layout, root, part)]
    source = PublishedSource(pairs, ids)
    for index in sorted({int(i) for i in np.linspace(0, len(source) - 1, _FIRST_LOOK)}):
        source[index]
    return Dataset(source, labels)


class PublishedSource:
    """Examples read from their files when they are asked for. It pickles.

    Args:
      pairs: the files.
      ids: the class, or `labels.IGNORE`, of each id that masks may hold.
    """

    def __init__(self, pairs: Sequence[Pair], ids: Mapping[int, int]) -> None:
        # Texts, which pickle in a fraction of the time that paths take.
        self._files = tuple((pair.name, str(pair.image), str(pair.mask)) for pair in pairs)
        self._table = np.full(256, _FOREIGN, np.int16)
        self._table[list(ids)] = list(ids.values())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} examples")
        name, *paths = self._files[index]
        image_path, mask_path = map(pathlib.Path, paths)
        image = reading.read_image(image_path)
        label = self._read_label(mask_path)
        reading.check_sizes(image_path, image.shape[:2], mask_path, label.shape)
        return {"image": image, "label": label, "name": name}

    def _read_label(self, path: pathlib.Path) -> np.ndarray:
        ids = reading.read_ids(path)
        label = np.where((ids >= 0) & (ids < 256), self._table[ids & 255], _FOREIGN)
        if (label == _FOREIGN).any():
            values = ", ".join(map(str, np.unique(ids[label == _FOREIGN])[:5]))
            known = ", ".join(map(str, np.flatnonzero(self._table != _FOREIGN)))
            raise UserError(f"{path}: holds {values}, no id of this data set, which has {known}")
        return label.astype(np.uint8)


def root_of(layout: Layout, config: DataConfig) -> pathlib.Path:
    """The folder that the config names.

    Raises:
      UserError: there is none; or archives lie in it that were not unpacked.
    """
    get = f"Unpack {' and '.join(layout.archives)} from {layout.home} into one folder"
    if not config.root:
        raise UserError(f"config.data.root is empty. {get}, and give it.")
    root = pathlib.Path(config.root).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.root: there is no folder {root}. {get}.")
    needed = [*layout.images.values(), *layout.masks.values()]
    missing = [folder for folder in needed if not (root / folder).is_dir()]
    if missing:
        packed = [name for name in layout.archives if (root / name).is_file()]
        mend = f"Unpack {' and '.join(packed)} there." if packed else f"{get}."
        if any((root.parent / folder).is_dir() for folder in needed):
            mend = f"The root is the folder it is in, {root.parent}."
        raise UserError(f"config.data.root: {root} has no {', no '.join(missing)}. {mend}")
    return root


def _pairs(layout: Layout, root: pathlib.Path, split: str) -> list[Pair]:
    images_folder, masks_folder = root / layout.images[split], root / layout.masks[split]
    images = _files(images_folder, layout.image_end)
    masks = _files(masks_folder, layout.mask_end)
    if not images:
        raise UserError(f"{images_folder}: holds no *{layout.image_end}")
    problems = [
        f"{path}: has no mask {masks_folder / name}{layout.mask_end}"
        for name, path in images.items()
        if name not in masks
    ]
    problems += [
        f"{path}: has no image {images_folder / name}{layout.image_end}"
        for name, path in masks.items()
        if name not in images
    ]
    reading.raise_together(f"{layout.title} {split} in {root}", problems)
    return [
        Pair(pathlib.PurePosixPath(name).name, images[name], masks[name], images_folder)
        for name in sorted(images)
    ]


def _files(folder: pathlib.Path, end: str) -> dict[str, pathlib.Path]:
    """The files below a folder whose names end so, by their path from it without the end."""
    return {
        path.relative_to(folder).as_posix().removesuffix(end): path
        for path in folder.rglob(f"*{end}")
    }
