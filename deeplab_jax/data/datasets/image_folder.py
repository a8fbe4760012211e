"""A user's own images and masks, read from their files; docs/own_data.md describes the layouts.

Loading a split matches file names and reads a few pairs, so that a wrong setting shows at startup.
Other damaged files raise an error when they are read. `deeplab-jax data check` reads all files.
"""

from __future__ import annotations

import itertools

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Dataset, Pair
from deeplab_jax.data.datasets.file_source import FileSource
from deeplab_jax.data.datasets.folder_layout import FolderLayout, detect_layout
from deeplab_jax.data.datasets.mask_format import read_mask_format
from deeplab_jax.data.datasets.pairing import SPLITS, Pattern, spell_settings
from deeplab_jax.utils.errors import UserError, raise_problems
from deeplab_jax.utils.paths import expand_home


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
    # Of all splits, so that each split has the same classes.
    mask_format = read_mask_format(config, list(itertools.chain(*layout.splits.values())))
    source = FileSource(pairs, mask_format.read_label, config.folder.channels)
    try:
        source.check_samples()
    except UserError as error:
        raise UserError(
            f"{error}\n`deeplab-jax data check {config.root}` reads all files and says what to fix."
        ) from None
    notes = (*layout.notes, *mask_format.notes)
    return Dataset(source, mask_format.labels, config.folder.channels, notes)


def _select_pairs(layout: FolderLayout, split: str, config: DataConfig) -> list[Pair]:
    """Returns the pairs of a split, or raises UserError if there are none."""
    parts = ("train", "val") if split == "trainval" else (split,)
    missing = next((part for part in parts if not layout.splits.get(part)), None)
    if missing:
        found = ", ".join(f"{name} ({len(pairs)})" for name, pairs in layout.splits.items())
        images, masks = layout.image_pattern, layout.mask_pattern
        hint = {
            "folders": f"Its images are {images.replace('{split}', missing)}, and its masks "
            f"{masks.replace('{split}', missing)}.",
            "lists": f"Write {missing}.txt, one name per line.",
            "csv": f"Write {missing} into the column split.",
        }.get(layout.kind)
        if not hint or not (layout.kind == "folders" or any(layout.splits.values())):
            hint = "config.data.folder.val_fraction says how many images are val."
        other = next((split for split in SPLITS if layout.splits.get(split)), "")
        if "{split}" in images and missing != "test" and other:
            image = layout.splits[other][0].image.relative_to(expand_home(config.root))
            file = Pattern(images).match(image.as_posix())
            spelling = file.spelling if file else other
            patterns = (text.replace("{split}", spelling) for text in (images, masks))
            hint += f" To divide {other} into train and val, set {spell_settings(*patterns)}"
        raise UserError(
            f"config.data.root: {config.root} has no images of split {missing}; it has "
            f"{found or 'none'}. {hint}"
        )
    return [pair for part in parts for pair in layout.splits[part]]
