"""A user's own images and masks, read where they lie; docs/own_data.md describes how they may.

At the start names are matched and a few pairs are read, so that a wrong setting shows at once; what
is wrong within a file shows when it is read. `deeplab-jax data check` reads all of them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.datasets import layout
from deeplab_jax.data.io import classes, masks, reading
from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data.io.reading import Pair
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.utils.errors import UserError

_FIRST_LOOK = 4  # pairs, evenly spread
_MASKS_LOOKED_INTO = 8  # where there is no file of classes, to say what it must name


def load(config: DataConfig, split: str) -> Dataset:
    """A split of the user's images.

    Args:
      config: its `root`, `folder` and `ignore_label` decide.
      split: train, val, test, or trainval for the first two together.

    Raises:
      UserError: the root is of no known layout; images or masks lack their counterpart; the classes
        are not known; a pair among a few is damaged. Reading an example raises one if it is.
    """
    found = layout.find(config)
    if found.problems:
        reading.raise_together(f"config.data.root: {config.root}", found.problems)
    pairs = pairs_of(found, split, config)
    mask_format = read_format(config, pairs)
    source = FolderSource(pairs, mask_format, config.folder.channels)
    _look_at_first(source, config.root)
    return Dataset(source, mask_format.labels, config.folder.channels)


def pairs_of(found: layout.Layout, split: str, config: DataConfig) -> list[Pair]:
    """The pairs of a split.

    Raises:
      UserError: there are none.
    """
    parts = ("train", "val") if split == "trainval" else (split,)
    absent = [part for part in parts if not found.splits.get(part)]
    if absent:
        held = ", ".join(f"{name} ({len(pairs)})" for name, pairs in found.splits.items())
        mend = {
            "folders": f"Make images/{absent[0]} and masks/{absent[0]}.",
            "lists": f"Write {absent[0]}.txt, a name a line.",
            "csv": f"Write {absent[0]} into the column split.",
        }.get(found.kind, "")
        if not mend or not (found.kind == "folders" or any(found.splits.values())):
            mend = "config.data.folder.val_fraction says how many images are val."
        raise UserError(
            f"config.data.root: {config.root} has no images of split {absent[0]}; it has "
            f"{held or 'none'}. {mend}"
        )
    return [pair for part in parts for pair in found.splits[part]]


class FolderSource:
    """Examples read from their files when they are asked for. It pickles.

    Args:
      pairs: the files.
      mask_format: what the masks hold.
      num_channels: of the images.
    """

    def __init__(self, pairs: Sequence[Pair], mask_format: MaskFormat, num_channels: int) -> None:
        # Texts, which pickle in a fraction of the time that paths take.
        self._files = tuple((pair.name, str(pair.image), str(pair.mask)) for pair in pairs)
        self._format = mask_format
        self._num_channels = num_channels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} examples")
        name, *paths = self._files[index]
        image_path, mask_path = map(pathlib.Path, paths)
        image = reading.read_image(image_path, self._num_channels)
        label = self._format.read_label(mask_path)
        reading.check_sizes(image_path, image.shape[:2], mask_path, label.shape)
        return {"image": image, "label": label, "name": name}


def _look_at_first(source: FolderSource, root: str) -> None:
    for index in sorted({int(i) for i in np.linspace(0, len(source) - 1, _FIRST_LOOK)}):
        try:
            source[index]
        except UserError as error:
            raise UserError(
                f"{error}\n`deeplab-jax data check {root}` reads all files and says what to mend."
            ) from None


def read_format(config: DataConfig, pairs: Sequence[Pair]) -> MaskFormat:
    """What masks hold, with the classes of the user's file.

    The ignore label is no class where it is the last line of the file.

    Args:
      config: its `folder`, `ignore_label` and `root`.
      pairs: looked into where there is no file, to say what to write.

    Raises:
      UserError: the file is missing or wrong.
    """
    holds, ignore_label = config.folder.masks_hold, config.ignore_label
    path = _classes_file(config)
    if holds == "binary":
        return MaskFormat(holds, _binary_classes(path, config), ignore_label)
    if not path.is_file():
        raise UserError(_no_classes(path, holds, ignore_label, pairs))
    labels = classes.read(path)
    ignored = labels.colors[ignore_label] if ignore_label < labels.num_classes else None
    if ignore_label == labels.num_classes - 1 > 0:
        labels = LabelSet(labels.names[:-1], labels.colors[:-1])
    if holds == "colors":
        _require_distinct(path, labels)
    return MaskFormat(holds, labels, ignore_label, ignored)


def _classes_file(config: DataConfig) -> pathlib.Path:
    if config.folder.classes:
        return pathlib.Path(config.folder.classes).expanduser()
    root = pathlib.Path(config.root).expanduser()
    return (root if root.is_dir() else root.parent) / "classes.txt"


def _binary_classes(path: pathlib.Path, config: DataConfig) -> LabelSet:
    if not path.is_file() and not config.folder.classes:
        return masks.BINARY
    labels = classes.read(path)
    if labels.num_classes != 2:
        raise UserError(
            f"{path}: names {labels.num_classes} classes, but config.data.folder.masks_hold=binary "
            "has two: that of 0, then that of 255"
        )
    return labels


def _require_distinct(path: pathlib.Path, labels: LabelSet) -> None:
    owners: dict[tuple[int, int, int], str] = {}
    for name, color in zip(labels.names, labels.colors, strict=True):
        if color in owners:
            raise UserError(f"{path}: {owners[color]} and {name} have one colour, {color}")
        owners[color] = name


def _no_classes(path: pathlib.Path, holds: str, ignore_label: int, pairs: Sequence[Pair]) -> str:
    """What the file of classes must name, by what the first masks hold."""
    blank = MaskFormat(holds, masks.BINARY, ignore_label)
    values: set[int] = set()
    looked_into = pairs[:_MASKS_LOOKED_INTO]
    for pair in looked_into:
        try:
            values |= {int(value) for value in np.unique(blank.read_values(pair.mask))}
        except UserError as error:
            return f"{path}: there is no file of class names; and {error}"
    told = ", ".join(blank.spell(value) for value in sorted(values)[:30])
    example = classes.EXAMPLE if holds == "colors" else "background\ncar\ntraffic light"
    order = "with its colour, " if holds == "colors" else "in the order of ids from 0, "
    return (
        f"{path}: there is no file of class names. Write a class a line, {order}as in\n{example}\n"
        f"The first {len(looked_into)} masks hold {told}{', ...' if len(values) > 30 else ''}."
        + (f" {ignore_label} is ignored." if holds == "ids" and ignore_label in values else "")
    )
