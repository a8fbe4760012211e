"""torchvision's reference input for training segmentation, in PyTorch's DataLoader.

The transforms are those of `references/segmentation` in torchvision's repository, which its
published DeepLabv3 models were trained with, on Pillow images: random scale of the shorter side,
flip, padding, random crop, normalization.
"""

from __future__ import annotations

import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from deeplab_jax.config import DataConfig, crop_shape
from deeplab_jax.data.labels import IGNORE
from speed.theirs import import_torchvision

_VISION = import_torchvision().transforms
transforms = _VISION.functional

_REPEATS = 1000  # of the files in an epoch, so that no epoch ends during a measurement


class Files(torch.utils.data.Dataset):
    """Pairs of image and mask files, read and transformed when they are accessed."""

    def __init__(
        self,
        pairs: Sequence[tuple[pathlib.Path, pathlib.Path]],
        config: DataConfig,
        shorter_side: int,
    ) -> None:
        """`config.scale_range` is relative to `shorter_side`, that of most images, in pixels."""
        self._pairs, self._config = pairs, config
        self._sides = [round(scale * shorter_side) for scale in config.scale_range]

    def __len__(self) -> int:
        return _REPEATS * len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image_path, mask_path = self._pairs[index % len(self._pairs)]
        image, mask = Image.open(image_path).convert("RGB"), Image.open(mask_path)
        side = random.randint(*self._sides)
        image = transforms.resize(image, [side], antialias=True)
        mask = transforms.resize(mask, [side], interpolation=_VISION.InterpolationMode.NEAREST)
        if self._config.flip and random.random() < 0.5:
            image, mask = transforms.hflip(image), transforms.hflip(mask)
        height, width = crop_shape(self._config)
        image = _padded(image, height, width, fill=0)
        mask = _padded(mask, height, width, fill=IGNORE)
        window = _VISION.RandomCrop.get_params(image, (height, width))
        image, mask = transforms.crop(image, *window), transforms.crop(mask, *window)
        pixels = transforms.convert_image_dtype(transforms.pil_to_tensor(image), torch.float)
        pixels = transforms.normalize(pixels, self._config.mean, self._config.std)
        return pixels, torch.as_tensor(np.array(mask), dtype=torch.int64)


def _padded(image: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    below, right = max(0, height - image.height), max(0, width - image.width)
    return transforms.pad(image, [0, 0, right, below], fill=fill) if below or right else image


def batches(files: Files, num_workers: int, batch_size: int) -> Iterator[Any]:
    """Yields shuffled batches `[n, 3, h, w]` and `[n, h, w]`, each made by one process."""
    return iter(
        DataLoader(files, batch_size, shuffle=True, num_workers=num_workers, drop_last=True)
    )
