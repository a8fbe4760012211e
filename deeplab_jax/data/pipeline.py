"""Batches for training and evaluation. The batch at a step depends only on (seed, step).

A run that resumes at a step therefore reads the batches that it would have read, on any number of
hosts and with any number of workers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Int32, UInt8

from deeplab_jax.config import DataConfig, crop_shape
from deeplab_jax.data import randomness
from deeplab_jax.data.augment import augment
from deeplab_jax.data.dataset import Dataset, Example, read_example
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.data.prefetch import BatchIterator, Empty
from deeplab_jax.utils.errors import UserError

_NUM_STEPS = 2**40  # the length of the endless sequence of training batches
_SIDE_STEP = 256  # pixels between the padded sides of images that are larger than usual


class Batch(TypedDict):
    """Images with labels, not yet normalized.

    Fields:
      image: uint8 `[b, h, w, c]`.
      label: uint8 `[b, h, w]`, class ids; `labels.IGNORE` where a pixel does not count.
    """

    image: UInt8[np.ndarray, "b h w c"]
    label: UInt8[np.ndarray, "b h w"]


class EvalBatch(Batch):
    """Uncropped images with labels, padded at the bottom and right.

    Fields:
      index: int32 `[b]`, index of the example in its data set; -1 for a padding row.
      size: int32 `[b, 2]`, height and width of the image without its padding; for a padding row,
        those of the batch.
    """

    index: Int32[np.ndarray, " b"]
    size: Int32[np.ndarray, "b 2"]


def train_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    rows: Sequence[int] | None = None,
) -> BatchIterator[Batch]:
    """Yields batches of augmented crops from a step on, without end.

    Row r of the batch at step s is example s * batch_size + r of an endless sequence of epochs.
    Each epoch contains every example once, in an order of its own.

    Args:
      dataset: the training split.
      config: crop size, scale range, flip, mean and number of workers.
      batch_size: number of images per step, over all hosts.
      seed: seed of the order and the augmentation.
      start_step: the step of the first batch.
      rows: the rows of the batch for this host; None: all.

    Raises:
      UserError: the data set is empty, or its number of channels differs from that of
        `config.mean`. The iterator raises one for a damaged example.
    """
    fill = mean_pixel(config)
    _check(dataset, fill)
    source = _TrainSource(
        dataset=dataset,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        fill=fill,
        seed=seed,
        crop=crop_shape(config),
        scale_range=(config.scale_range[0], config.scale_range[1]),
        flip=config.flip,
    )
    return BatchIterator(source, start_step, config.num_workers)


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    shape: Callable[[int, int], tuple[int, int]],
    fill: UInt8[np.ndarray, " c"],
    rows: Sequence[int] | None = None,
    transform: Callable[[Example], Example] | None = None,
) -> BatchIterator[EvalBatch]:
    """Yields each image once, uncropped and in order, padded at the bottom and right.

    The last batch is completed by padding rows, which hold `fill` and `labels.IGNORE`. At each
    step, the batches of all hosts have the same height and width.

    Args:
      dataset: the split to evaluate.
      batch_size: number of images per step, over all hosts.
      shape: maps the largest height and width in a batch to the batch's height and width, such as
        `square_shape`. A program is compiled for each result, so they should be few.
      fill: colour of the padding, see `mean_pixel`.
      rows: the rows of each batch for this host; None: all.
      transform: applied to each example before the padding; None: no transform.

    Raises:
      UserError: as `train_batches`.
    """
    _check(dataset, fill)
    source = _EvalSource(
        dataset=dataset,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        fill=fill,
        shape=shape,
        transform=transform,
    )
    # In threads: an evaluation ends before processes would pay off.
    return BatchIterator(source, 0, num_workers=0)


def num_eval_batches(dataset: Dataset, batch_size: int) -> int:
    """Returns the number of batches that `eval_batches` yields."""
    return math.ceil(len(dataset.source) / batch_size)


def mean_pixel(config: DataConfig) -> UInt8[np.ndarray, " c"]:
    """Returns the mean colour, 0..255. Images are padded with it, as normalization maps it to 0."""
    return np.clip(np.rint(np.array(config.mean) * 255), 0, 255).astype(np.uint8)


def square_shape(height: int, width: int, *, size: int) -> tuple[int, int]:
    """Returns a square of side `size`, or the next larger side 256 k + 1 for larger images."""
    longest = max(height, width)
    side = size if longest <= size else _SIDE_STEP * math.ceil((longest - 1) / _SIDE_STEP) + 1
    return side, side


def _check(dataset: Dataset, fill: np.ndarray) -> None:
    if len(dataset.source) == 0:
        raise UserError("the data set holds no images")
    if len(fill) != dataset.num_channels:
        raise UserError(
            f"config.data.mean has {len(fill)} values, but the images have "
            f"{dataset.num_channels} channels: set one value per channel in config.data.mean and "
            "config.data.std"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainSource:
    """Random access to training batches by step."""

    dataset: Dataset
    batch_size: int
    rows: Sequence[int]
    fill: np.ndarray
    seed: int
    crop: tuple[int, int]
    scale_range: tuple[float, float]
    flip: bool

    def __len__(self) -> int:
        return _NUM_STEPS

    @property
    def nbytes(self) -> int:
        """Bytes of a batch."""
        return len(self.rows) * math.prod(self.crop) * (self.dataset.num_channels + 1)

    def batch(self, step: int, empty: Empty) -> Batch:
        shape = (len(self.rows), *self.crop)
        batch = Batch(
            image=empty((*shape, self.dataset.num_channels), np.uint8), label=empty(shape, np.uint8)
        )
        size = len(self.dataset.source)
        for image, label, row in zip(batch["image"], batch["label"], self.rows, strict=True):
            position = step * self.batch_size + row  # in the sequence of epochs
            epoch, offset = divmod(position, size)
            index = int(randomness.permutation(size, self.seed, epoch)[offset])
            example = read_example(self.dataset, index)
            augment(
                example["image"],
                example["label"],
                randomness.generator(self.seed, randomness.AUGMENT, position),
                crop=self.crop,
                scale_range=self.scale_range,
                flip=self.flip,
                fill=self.fill,
                out=(image, label),
            )
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalSource:
    """Random access to the batches of an evaluation."""

    dataset: Dataset
    batch_size: int
    rows: Sequence[int]
    fill: np.ndarray
    shape: Callable[[int, int], tuple[int, int]]
    transform: Callable[[Example], Example] | None

    def __len__(self) -> int:
        return num_eval_batches(self.dataset, self.batch_size)

    @property
    def nbytes(self) -> int:
        """Bytes of a batch of images of the first one's size."""
        height, width = self.shape(*self._read(0)["label"].shape)
        return len(self.rows) * height * width * (self.dataset.num_channels + 1)

    def batch(self, step: int, empty: Empty) -> EvalBatch:
        first = step * self.batch_size
        stop = min(first + self.batch_size, len(self.dataset.source))
        # Rows of other hosts are read too: their sizes determine the shape that all hosts share.
        examples = [self._read(index) for index in range(first, stop)]
        heights, widths = zip(*(example["label"].shape for example in examples), strict=True)
        shape = self.shape(max(heights), max(widths))
        num_rows = len(self.rows)
        image = empty((num_rows, *shape, self.dataset.num_channels), np.uint8)
        label = empty((num_rows, *shape), np.uint8)
        index = np.full(num_rows, -1, np.int32)
        size = np.full((num_rows, 2), shape, np.int32)
        image[:], label[:] = self.fill, IGNORE
        for i, row in enumerate(self.rows):
            if row < len(examples):
                height, width = size[i] = examples[row]["label"].shape
                image[i, :height, :width] = examples[row]["image"]
                label[i, :height, :width] = examples[row]["label"]
                index[i] = first + row
        return {"image": image, "label": label, "index": index, "size": size}

    def _read(self, index: int) -> Example:
        example = read_example(self.dataset, index)
        return example if self.transform is None else self.transform(example)
