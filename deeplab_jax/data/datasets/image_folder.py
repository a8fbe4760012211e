"""A user's own images and masks, read from their files; docs/own_data.md describes the layouts.

Loading a split matches file names and reads a few pairs, so that a wrong setting shows at startup.
Other damaged files raise an error when they are read. `deeplab-jax data check` reads all files.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Dataset, Pair
from deeplab_jax.data.datasets.file_source import FileSource
from deeplab_jax.data.datasets.folder_layout import FolderLayout, detect_layout
from deeplab_jax.data.io import classes, masks
from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.utils.errors import UserError, raise_problems
from deeplab_jax.utils.paths import expand_home

_NUM_SAMPLED_MASKS = 8  # read if there is no file of classes, to say what it must name


def load(config: DataConfig, split: str) -> Dataset:
    """Loads a split of the user's images.

    Args:
      config: its `root`, `folder` and `ignore_label` are used.
      split: train, val, test, or trainval for train and val.

    Raises:
      UserError: the root has no known layout; an image or a mask lacks its counterpart; the classes
        are unknown; or one of the few pairs that are read is damaged.
    """
    layout = detect_layout(config)
    raise_problems(f"config.data.root: {config.root}", layout.problems)
    pairs = _select_pairs(layout, split, config)
    mask_format = read_mask_format(config, pairs)
    source = FileSource(pairs, mask_format.read_label, config.folder.channels)
    try:
        source.check_samples()
    except UserError as error:
        raise UserError(
            f"{error}\n`deeplab-jax data check {config.root}` reads all files and says what to fix."
        ) from None
    return Dataset(source, mask_format.labels, config.folder.channels)


def _select_pairs(layout: FolderLayout, split: str, config: DataConfig) -> list[Pair]:
    """Returns the pairs of a split, or raises UserError if there are none."""
    parts = ("train", "val") if split == "trainval" else (split,)
    missing = next((part for part in parts if not layout.splits.get(part)), None)
    if missing:
        found = ", ".join(f"{name} ({len(pairs)})" for name, pairs in layout.splits.items())
        hint = {
            "folders": f"Make images/{missing} and masks/{missing}.",
            "lists": f"Write {missing}.txt, one name per line.",
            "csv": f"Write {missing} into the column split.",
        }.get(layout.kind)
        if not hint or not (layout.kind == "folders" or any(layout.splits.values())):
            hint = "config.data.folder.val_fraction says how many images are val."
        raise UserError(
            f"config.data.root: {config.root} has no images of split {missing}; it has "
            f"{found or 'none'}. {hint}"
        )
    return [pair for part in parts for pair in layout.splits[part]]


def read_mask_format(config: DataConfig, pairs: Sequence[Pair]) -> MaskFormat:
    """Returns how the masks encode the classes, which the user's file of classes names.

    If the ignore label is the last class in the file, it is not a class of the data set.

    Args:
      config: its `folder`, `ignore_label` and `root` are used.
      pairs: if there is no file of classes, the first masks are read to say what to write.

    Raises:
      UserError: the file is missing or wrong.
    """
    encoding, ignore_label = config.folder.masks_hold, config.ignore_label
    root = expand_home(config.root)
    default = (root if root.is_dir() else root.parent) / "classes.txt"
    path = expand_home(config.folder.classes or default)
    if encoding == "binary" and not config.folder.classes and not path.is_file():
        return MaskFormat(encoding, masks.BINARY, ignore_label)
    if encoding != "binary" and not path.is_file():
        raise UserError(_ask_for_classes(path, encoding, ignore_label, pairs))
    labels = classes.read(path)
    if encoding == "binary":
        if labels.num_classes != 2:
            raise UserError(
                f"{path}: names {labels.num_classes} classes, but "
                "config.data.folder.masks_hold=binary has two: that of 0, then that of 255"
            )
        return MaskFormat(encoding, labels, ignore_label)
    ignored = labels.colors[ignore_label] if ignore_label < labels.num_classes else None
    if ignore_label == labels.num_classes - 1 > 0:
        labels = LabelSet(labels.names[:-1], labels.colors[:-1])
    if encoding == "colors":
        names: dict[tuple[int, int, int], str] = {}
        for name, color in zip(labels.names, labels.colors, strict=True):
            if names.setdefault(color, name) != name:
                raise UserError(f"{path}: {names[color]} and {name} have one colour, {color}")
    return MaskFormat(encoding, labels, ignore_label, ignored)


def _ask_for_classes(
    path: pathlib.Path, encoding: str, ignore_label: int, pairs: Sequence[Pair]
) -> str:
    """Returns a message that says what the missing file of classes must name."""
    mask_format = MaskFormat(encoding, masks.BINARY, ignore_label)
    values: set[int] = set()
    sampled = pairs[:_NUM_SAMPLED_MASKS]
    for pair in sampled:
        try:
            values |= set(np.unique(mask_format.read_values(pair.mask)).tolist())
        except UserError as error:
            return f"{path}: there is no file of class names; and {error}"
    found = ", ".join(mask_format.describe_value(value) for value in sorted(values)[:30])
    example = classes.EXAMPLE if encoding == "colors" else "background\ncar\ntraffic light"
    order = "with its colour, " if encoding == "colors" else "in the order of ids from 0, "
    return (
        f"{path}: there is no file of class names. Write one class per line, {order}as in\n"
        f"{example}\nThe first {len(sampled)} masks hold {found}{', ...' * (len(values) > 30)}."
        + (f" {ignore_label} is ignored." if encoding == "ids" and ignore_label in values else "")
    )
