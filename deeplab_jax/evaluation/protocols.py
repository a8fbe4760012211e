"""Evaluation protocols by name: how images are padded and resized before the model sees them.

Padding, resizing and the resolution of the labels each change the mIoU, so that two mIoUs compare
only under one protocol.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from deeplab_jax.config import EvalConfig
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Example
from deeplab_jax.inference.padding import bucket

TORCHVISION_SIDE = 520  # the shorter side in torchvision's `references/segmentation`, pixels


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to evaluate.

    Attributes:
      prepare: function applied to each example before it is padded, or None.
      padding_is_image: whether the model sees the padding, of the mean colour, as a part of the
        image. If False, the padding is masked.
    """

    prepare: Callable[[Example], Example] | None
    padding_is_image: bool

    def shape(self, config: EvalConfig) -> Callable[[int, int], tuple[int, int]]:
        """Returns the function from largest height and width to padded height and width."""
        if self.padding_is_image:
            return functools.partial(pipeline.square_shape, size=config.size)
        return lambda height, width: (bucket(height), bucket(width))


def resize_shorter_side(example: Example, *, side: int = TORCHVISION_SIDE) -> Example:
    """Resizes image and label to a shorter side, pixels, as torchvision's `SegmentationPresetEval`.

    Its backend is Pillow: the image is resized bilinearly with antialiasing, the label by nearest
    neighbour. The longer side is rounded down.
    """
    height, width = example["label"].shape
    short, long = min(height, width), max(height, width)
    longer = int(side * long / short)
    size = (side, longer) if width <= height else (longer, side)  # width, height
    channels = [
        np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR))
        for channel in np.moveaxis(example["image"], -1, 0)
    ]
    label = Image.fromarray(example["label"]).resize(size, Image.Resampling.NEAREST)
    return {**example, "image": np.stack(channels, axis=-1), "label": np.asarray(label)}


PROTOCOLS = {
    # Whole images at their own size, padded with the mean colour to a square of 513 pixels, which
    # the model sees; larger ones to the next 256 k + 1.
    "paper": Protocol(prepare=None, padding_is_image=True),
    # Whole images at their own size; padding is masked and changes nothing.
    "native": Protocol(prepare=None, padding_is_image=False),
    # Images and labels resized to a shorter side of 520 pixels, as torchvision's reference
    # evaluation does; scored at that size.
    "torchvision": Protocol(prepare=resize_shorter_side, padding_is_image=False),
}
