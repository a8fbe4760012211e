"""Images of hard classes shown more often: the paper's bootstrapping on hard images.

Source: arXiv 1706.05587, "Test set result and an effective bootstrapping method": images that hold
bicycle, chair, table, potted plant or sofa are duplicated in the training set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from rich.console import Console

from deeplab_jax.config import DataConfig
from deeplab_jax.data import statistics as passes
from deeplab_jax.data.dataset import Dataset, Example, Source
from deeplab_jax.utils.errors import UserError, did_you_mean


def apply(config: DataConfig, dataset: Dataset, *, quiet: bool = False) -> Dataset:
    """The training split, in which images of `config.duplicate_classes` come `duplicates` times.

    Each time is an example of its own, with its place in the epoch and its augmentation. What is
    found is a function of the data alone, so that a run that resumes and all its hosts have the
    same epochs.

    Args:
      config: of the data; without classes the split stays as it is, and is not read.
      dataset: the training split.
      quiet: show no progress, and do not say how many images there are.

    Raises:
      UserError: the data set has no such class, or an example is damaged.
    """
    wanted = class_ids(config.duplicate_classes, dataset.labels.names)
    if not wanted or config.duplicates == 1:
        return dataset
    counts = passes.class_pixels(dataset, "images of hard classes", quiet=quiet)
    hard = np.fromiter((count[wanted].any() for count in counts), bool)
    times = np.where(hard, config.duplicates, 1)
    if not quiet:
        names = ", ".join(dataset.labels.names[index] for index in wanted)
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"duplicated: {hard.sum():,} of {len(hard):,} images, which hold {names}, come "
            f"{config.duplicates} times in an epoch of {times.sum():,}",
            markup=False,
        )
    indices = np.repeat(np.arange(len(hard)), times)
    return dataclasses.replace(dataset, source=_Repeated(dataset.source, indices))


def class_ids(classes: Sequence[str], names: Sequence[str]) -> list[int]:
    """Ids of classes by name, ascending.

    Args:
      classes: names; one with commas that is no name itself holds several, which is what a flag
        without quotes gives.
      names: of all classes.

    Raises:
      UserError: there is no class of that name, with the nearest.
    """
    chosen = [
        name.strip()
        for text in classes
        for name in ([text] if text in names else text.split(","))
        if name.strip()
    ]
    for name in chosen:
        if name not in names:
            hint = did_you_mean(name, names)
            raise UserError(
                f"config.data.duplicate_classes: there is no class {name!r}{hint}. "
                f"The classes are {', '.join(names)}"
            )
    return sorted({names.index(name) for name in chosen})


@dataclasses.dataclass(frozen=True, eq=False)
class _Repeated:
    """Examples of a source, some of them several times."""

    source: Source
    indices: Int[np.ndarray, " examples"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]
