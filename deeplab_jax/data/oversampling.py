"""Oversampling of images with hard classes: the paper's bootstrapping.

Source: arXiv 1706.05587, "Test set result and an effective bootstrapping method": images that
contain bicycle, chair, table, potted plant or sofa are duplicated in the training set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from deeplab_jax.config import DataConfig
from deeplab_jax.data import statistics
from deeplab_jax.data.dataset import Dataset, IndexedSource
from deeplab_jax.utils.errors import UserError, did_you_mean


def apply(config: DataConfig, dataset: Dataset, *, quiet: bool = False) -> Dataset:
    """Returns the training split with each image of `config.duplicate_classes` repeated.

    Such an image appears `config.duplicates` times per epoch, each time with its own position and
    augmentation. Which images are repeated depends only on the data, so all hosts, and a run that
    resumes, have the same epochs. Without classes the split is returned unchanged, and unread.

    Raises:
      UserError: the data set has no class of a name, or an example is damaged.
    """
    hard_ids = class_ids(config.duplicate_classes, dataset.labels.names)
    if not hard_ids or config.duplicates == 1:
        return dataset
    pixels = statistics.class_pixels(dataset, "images of hard classes", quiet=quiet)
    is_hard = np.fromiter((counts[hard_ids].any() for counts in pixels), bool)
    repeats = np.where(is_hard, config.duplicates, 1)
    if not quiet:
        names = ", ".join(dataset.labels.names[index] for index in hard_ids)
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"oversampling: {is_hard.sum():,} of {len(is_hard):,} images contain {names}; they "
            f"appear {config.duplicates} times in an epoch of {repeats.sum():,}",
            markup=False,
        )
    indices = np.repeat(np.arange(len(is_hard)), repeats)
    return dataclasses.replace(dataset, source=IndexedSource(dataset.source, indices))


def class_ids(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Returns the ids, in ascending order, of classes among `names`.

    A text with commas that is not itself a name is a list of names, as from a flag without quotes.

    Raises:
      UserError: a name is unknown; the message suggests the nearest.
    """
    chosen = [
        name.strip()
        for text in classes
        for name in ([text] if text in names else text.split(","))
        if name.strip()
    ]
    for name in chosen:
        if name not in names:
            raise UserError(
                f"config.data.duplicate_classes: there is no class {name!r}"
                f"{did_you_mean(name, names)}. The classes are {', '.join(names)}"
            )
    return sorted({names.index(name) for name in chosen})
