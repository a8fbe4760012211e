"""Cityscapes: 2975 and 500 street scenes of 2048 x 1024 pixels with fine labels of 19 classes.

`config.data.root` holds `leftImg8bit/` and `gtFine/`, unpacked from `leftImg8bit_trainvaltest.zip`
and `gtFine_trainvaltest.zip`, which require a registration. TFDS's builder of this data set needs
TensorFlow, so the files are read as published.

Masks are the `*_gtFine_labelIds.png`; ids that are not evaluated are ignored. The labels of the
test images are not published. Source: Cordts et al. 2016, and their `labels.py`.
"""

from __future__ import annotations

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.datasets import raw
from deeplab_jax.data.datasets.archives import Archive

# The id in a mask of each class, in the order of `labels.CITYSCAPES`.
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# Licence plates have the id -1, which is 255 in 8 bits.
CLASS_OF_ID = dict.fromkeys([*range(34), 255], labels.IGNORE) | {
    mask_id: index for index, mask_id in enumerate(_EVALUATED)
}
_CITYSCAPES = raw.RawDataset(
    title="Cityscapes",
    images={"train": "leftImg8bit/train", "val": "leftImg8bit/val"},
    masks={"train": "gtFine/train", "val": "gtFine/val"},
    image_suffix="_leftImg8bit.png",
    mask_suffix="_gtFine_labelIds.png",
    archives=tuple(
        Archive(f"{folder}_trainvaltest.zip", ("https://www.cityscapes-dataset.com",), folder)
        for folder in ("leftImg8bit", "gtFine")
    ),
    class_of_id=CLASS_OF_ID,
    read_labels=lambda _: labels.CITYSCAPES,
)


def load(config: DataConfig, split: str) -> Dataset:
    """Loads the split train, val or trainval; see `raw.load`."""
    return raw.load(_CITYSCAPES, config, split)
