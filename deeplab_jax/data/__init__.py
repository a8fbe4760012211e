"""Data sets by name, augmentation and batches, as NumPy arrays on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.paths import is_bucket
from deeplab_jax.utils.registry import Registry, resolved

Load = Callable[[DataConfig, str], Dataset]


@dataclasses.dataclass(frozen=True)
class DatasetEntry:
    """A data set in `DATASETS`."""

    # Returns a split, called as `load(config.data, split)`. May be a string "module:function",
    # which is imported when the data set is loaded.
    load: Load | str
    splits: tuple[str, ...]  # names
    num_classes: int | None = None  # None: it depends on the user's files


_VOC_SPLITS = ("train", "trainaug", "trainval", "val", "test")
_SPLITS = ("train", "val", "trainval")
_FOLDER_SPLITS = ("train", "val", "test", "trainval")
# Strings, so that a data set that does not use TFDS does not import it.
DATASETS: Registry[DatasetEntry] = Registry(
    "data set",
    {
        "voc": DatasetEntry("deeplab_jax.data.datasets.voc:load", _VOC_SPLITS, 21),
        "coco": DatasetEntry("deeplab_jax.data.datasets.coco:load", ("train", "val"), 21),
        "cityscapes": DatasetEntry("deeplab_jax.data.datasets.cityscapes:load", _SPLITS, 19),
        "ade20k": DatasetEntry("deeplab_jax.data.datasets.ade20k:load", _SPLITS, 150),
        "folder": DatasetEntry("deeplab_jax.data.datasets.image_folder:load", _FOLDER_SPLITS),
        "shapes": DatasetEntry("deeplab_jax.data.datasets.shapes:load", ("train", "val"), 5),
    },
)


def load(config: DataConfig, split: str) -> Dataset:
    """Loads a split of the data set `config.name`.

    Args:
      config: the config of the data; its paths may be in a bucket, see `stage`.
      split: name of the split, such as `config.split` or `config.eval_split`.

    Raises:
      UserError: the data set or split is unknown, or its files are missing or damaged.
    """
    entry = DATASETS[config.name]
    if split not in entry.splits:
        raise UserError(
            f"split of data set {config.name} must be one of {', '.join(entry.splits)}, got "
            f"{split!r}{did_you_mean(split, entry.splits)}"
        )
    return resolved(entry.load)(stage(config), split)


def stage(config: DataConfig, wanted: Callable[[str], bool] | None = None) -> DataConfig:
    """Copies data that are in a bucket to this machine; returns a config with local paths.

    Args:
      config: its `root` and `folder.classes` may be in a bucket. The root may be a file, whose
        folder is copied.
      wanted: which files of the root to copy, by their names in it. Default: all.

    Raises:
      UserError: as `buckets.staging.stage`.
    """
    root, classes = config.root, config.folder.classes
    if not (is_bucket(root) or is_bucket(classes)):
        return config
    from deeplab_jax.buckets import staging

    title = "training reads each image many times"
    if is_bucket(root):
        path = staging.stage(root, wanted, title=title)
        if path.is_file():
            staging.stage(root.rpartition("/")[0], wanted, title=title)
        root = str(path)
    if is_bucket(classes):
        classes = str(staging.stage(classes, title="the names of the classes"))
    folder = dataclasses.replace(config.folder, classes=classes)
    return dataclasses.replace(config, root=root, folder=folder)
