"""Data on the host: data sets by name, augmentation, batches. NumPy arrays throughout."""

from __future__ import annotations

from collections.abc import Callable

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.errors import UserError, did_you_mean


def load(config: DataConfig, split: str) -> Dataset:
    """A split of the data set that the config names.

    Args:
      config: its `name`, `root` and the fields of that data set decide.
      split: as `config.split` or `config.eval_split`.

    Raises:
      UserError: there is no data set or split of that name, or its files are absent or damaged.
    """
    if config.name not in _LOADERS:
        raise UserError(_unknown("config.data.name", config.name, _LOADERS))
    loader, splits = _LOADERS[config.name]
    if split not in splits:
        raise UserError(_unknown(f"split of data set {config.name}", split, splits))
    return loader(config, split)


# A loader imports its module when called: the generated data set does not pay for TFDS.


def _load_voc(config: DataConfig, split: str) -> Dataset:
    from deeplab_jax.data import voc

    return voc.load(config, split)


def _load_shapes(config: DataConfig, split: str) -> Dataset:
    from deeplab_jax.data import shapes

    return shapes.load(config, split)


def _load_folder(config: DataConfig, split: str) -> Dataset:
    from deeplab_jax.data import folder

    return folder.load(config, split)


def _load_coco(config: DataConfig, split: str) -> Dataset:
    from deeplab_jax.data import coco

    return coco.load(config, split)


def _load_cityscapes(config: DataConfig, split: str) -> Dataset:
    from deeplab_jax.data import cityscapes

    return cityscapes.load(config, split)


def _load_ade20k(config: DataConfig, split: str) -> Dataset:
    from deeplab_jax.data import ade20k

    return ade20k.load(config, split)


# Name: what loads it, its splits.
_LOADERS: dict[str, tuple[Callable[[DataConfig, str], Dataset], tuple[str, ...]]] = {
    "voc": (_load_voc, ("train", "trainaug", "trainval", "val", "test")),
    "coco": (_load_coco, ("train", "val")),
    "cityscapes": (_load_cityscapes, ("train", "val", "trainval")),
    "ade20k": (_load_ade20k, ("train", "val", "trainval")),
    "folder": (_load_folder, ("train", "val", "test", "trainval")),
    "shapes": (_load_shapes, ("train", "val")),
}


def _unknown(what: str, name: str, known: dict | tuple[str, ...]) -> str:
    return f"{what} must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
