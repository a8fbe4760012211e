"""Data on the host: data sets by name, augmentation, batches. NumPy arrays throughout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.registry import Registry, resolved

Load = Callable[[DataConfig, str], Dataset]


@dataclasses.dataclass(frozen=True)
class DatasetEntry:
    """A data set in `DATASETS`.

    Attributes:
      load: gives a split, as `load(config.data, split)`; or the text "module:function", which is
        imported when the data set is loaded.
      splits: names of its splits.
      num_classes: number of its classes, if it does not depend on the user's files.
    """

    load: Load | str
    splits: tuple[str, ...]
    num_classes: int | None = None


_VOC_SPLITS = ("train", "trainaug", "trainval", "val", "test")
_SPLITS = ("train", "val", "trainval")
_FOLDER_SPLITS = ("train", "val", "test", "trainval")
# As texts, so that the generated data set does not pay for importing TFDS.
DATASETS: Registry[DatasetEntry] = Registry(
    "data set",
    {
        "voc": DatasetEntry("deeplab_jax.data.datasets.voc:load", _VOC_SPLITS, 21),
        "coco": DatasetEntry("deeplab_jax.data.datasets.coco:load", ("train", "val"), 21),
        "cityscapes": DatasetEntry("deeplab_jax.data.datasets.cityscapes:load", _SPLITS, 19),
        "ade20k": DatasetEntry("deeplab_jax.data.datasets.ade20k:load", _SPLITS, 150),
        "folder": DatasetEntry("deeplab_jax.data.datasets.folder:load", _FOLDER_SPLITS),
        "shapes": DatasetEntry("deeplab_jax.data.datasets.shapes:load", ("train", "val"), 5),
    },
)


def load(config: DataConfig, split: str) -> Dataset:
    """A split of the data set that the config names.

    Args:
      config: its `name`, `root` and the fields of that data set decide.
      split: as `config.split` or `config.eval_split`.

    Raises:
      UserError: there is no data set or split of that name, or its files are absent or damaged.
    """
    if config.name not in DATASETS:
        raise UserError(_unknown("config.data.name", config.name, DATASETS))
    entry = DATASETS[config.name]
    if split not in entry.splits:
        raise UserError(_unknown(f"split of data set {config.name}", split, entry.splits))
    return resolved(entry.load)(config, split)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    return f"{what} must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
