"""Protocols of evaluation by name: what is done to an image before the model sees it.

A mIoU says little without its protocol: padding, resizing and the resolution at which labels are
compared each move it.
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
from deeplab_jax.inference.predictor import bucket

TORCHVISION_SIDE = 520  # the shorter side in torchvision's `references/segmentation`, pixels


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to evaluate.

    Attributes:
      summary: what it does, in a line.
      prepare: what is done to an example first; None: nothing.
      padding_is_image: whether the model takes the padding for a part of the image, of the mean
        colour, rather than being told each image's own size.
    """

    summary: str
    prepare: Callable[[Example], Example] | None
    padding_is_image: bool

    def shape(self, config: EvalConfig) -> Callable[[int, int], tuple[int, int]]:
        """Height and width that images are padded to, of their largest height and width."""
        if self.padding_is_image:
            return functools.partial(pipeline.square, size=config.size)
        return buckets


def buckets(height: int, width: int) -> tuple[int, int]:
    """The next of few heights and of few widths, pixels."""
    return bucket(height), bucket(width)


def shorter_side(example: Example, *, side: int) -> Example:
    """Image and label resized as torchvision's `SegmentationPresetEval` does it with Pillow.

    The image is bilinear and antialiased, the label nearest. The longer side is rounded down.
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
    return {
        "image": np.stack(channels, axis=-1),
        "label": np.asarray(label),
        "name": example["name"],
    }


PROTOCOLS: dict[str, Protocol] = {
    "paper": Protocol(
        "whole images at their own size, padded with the mean colour to a square of 513 pixels, "
        "which the model sees; larger ones to the next 256 k + 1",
        prepare=None,
        padding_is_image=True,
    ),
    "native": Protocol(
        "whole images at their own size; padding, where there is any, changes nothing",
        prepare=None,
        padding_is_image=False,
    ),
    "torchvision": Protocol(
        "images and labels resized to a shorter side of 520 pixels, as torchvision's reference "
        "evaluation does; scored at that size",
        prepare=functools.partial(shorter_side, side=TORCHVISION_SIDE),
        padding_is_image=False,
    ),
}
