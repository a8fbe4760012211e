"""Cityscapes: 2975 and 500 street scenes of 2048 x 1024 pixels with fine labels of 19 classes.

`data.root` holds `leftImg8bit/` and `gtFine/`, as `leftImg8bit_trainvaltest.zip` and
`gtFine_trainvaltest.zip` unpack, which one gets after registering. The files are read where they
lie: TFDS's builder of this data set needs TensorFlow to prepare it.

Masks are the `*_gtFine_labelIds.png`; ids that are not evaluated are ignored. The labels of the
test images are not published. Source: Cordts et al. 2016, and their `labels.py`.
"""

from __future__ import annotations

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.datasets import raw as published

LAYOUT = published.Layout(
    title="Cityscapes",
    images={"train": "leftImg8bit/train", "val": "leftImg8bit/val"},
    masks={"train": "gtFine/train", "val": "gtFine/val"},
    image_end="_leftImg8bit.png",
    mask_end="_gtFine_labelIds.png",
    archives=("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"),
    home="https://www.cityscapes-dataset.com",
)
SPLITS = {"train": ("train",), "val": ("val",), "trainval": ("train", "val")}

NUM_IDS = 34
# The id in a mask of each class, in the order of `labels.CITYSCAPES`.
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# Licence plates have the id -1, which a file of bytes holds as 255.
CLASS_OF_ID = dict.fromkeys([*range(NUM_IDS), 255], labels.IGNORE) | {
    mask_id: index for index, mask_id in enumerate(_EVALUATED)
}


def load(config: DataConfig, split: str) -> Dataset:
    """A split of Cityscapes, in the order of names; trainval has train before val.

    Args:
      config: its `root` is the folder in which the archives were unpacked.
      split: train, val or trainval.

    Raises:
      UserError: files are missing or damaged; see `published.load`.
    """
    return published.load(LAYOUT, config, SPLITS[split], CLASS_OF_ID, labels.CITYSCAPES)
