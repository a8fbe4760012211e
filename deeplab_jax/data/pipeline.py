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
from jaxtyping import Int32, Shaped, UInt8

from deeplab_jax.config import AugmentConfig, DataConfig, crop_shape
from deeplab_jax.data import color, mixing, randomness
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
        at most those of the batch.
      name: str `[b]`, name of the example; "" for a padding row.
    """

    index: Int32[np.ndarray, " b"]
    size: Int32[np.ndarray, "b 2"]
    name: Shaped[np.ndarray, " b"]


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
      config: crop size, augmentation, mean and number of workers.
      batch_size: number of images per step, over all hosts.
      seed: seed of the order and the augmentation.
      start_step: the step of the first batch.
      rows: the rows of the batch for this host; None: all.

    Raises:
      UserError: the data set is empty, or its number of channels differs from that of
        `config.mean`. The iterator raises one for a damaged example.
    """
    source = _train_source(dataset, config, batch_size=batch_size, seed=seed, rows=rows)
    return BatchIterator(source, start_step, config.num_workers)


def train_batch(
    dataset: Dataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    step: int,
    rows: Sequence[int] | None = None,
) -> Batch:
    """Returns one batch of `train_batches`, made in this thread."""
    source = _train_source(dataset, config, batch_size=batch_size, seed=seed, rows=rows)
    return source.batch(step, np.empty)


def train_index(size: int, seed: int, position: int) -> int:
    """Returns which of `size` examples is at a position in the endless sequence of epochs."""
    epoch, offset = divmod(position, size)
    return int(randomness.permutation(size, seed, epoch)[offset])


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

    The last batch is completed by padding rows, which hold `fill` and `labels.IGNORE`. Each host
    reads only the images of its own rows, so that the batches of a step differ in height and width
    between hosts; the largest height and width are those of the whole batch, see `pad_batch`. Hosts
    along the height of images have the same rows and read the same images.

    Args:
      dataset: the split to evaluate.
      batch_size: number of images per step, over all hosts.
      shape: maps the largest height and width in a batch to the batch's height and width, such as
        `square_shape`. It must never decrease with either. A program is compiled for each result,
        so they should be few.
      fill: colour of the padding, see `mean_pixel`.
      rows: the rows of each batch for this host, in order; None: all.
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


def pad_batch(batch: EvalBatch, shape: tuple[int, int], fill: UInt8[np.ndarray, " c"]) -> EvalBatch:
    """Pads a batch of `eval_batches` further, to a height and width that are not smaller."""
    rows, height, width, channels = batch["image"].shape
    if (height, width) == shape:
        return batch
    image = np.full((rows, *shape, channels), fill)
    label = np.full((rows, *shape), IGNORE, np.uint8)
    image[:, :height, :width], label[:, :height, :width] = batch["image"], batch["label"]
    return {**batch, "image": image, "label": label}


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
    augment: AugmentConfig

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
            rng = randomness.generator(self.seed, randomness.AUGMENT, position)
            self._draw(train_index(size, self.seed, position), rng, (image, label))
            if self.augment.mix:
                self._mix(randomness.generator(self.seed, randomness.MIX, position), (image, label))
        return batch

    def _draw(self, index: int, rng: np.random.Generator, out: mixing.Crop) -> None:
        """Draws a crop of an example into the arrays `out`."""
        example = read_example(self.dataset, index)
        augment(
            example["image"],
            example["label"],
            rng,
            crop=self.crop,
            scale_range=self.scale_range,
            flip=self.flip,
            fill=self.fill,
            rotation=self.augment.rotation,
            max_class_share=self.augment.max_class_share,
            out=out,
        )
        color.distort(out[0], self.augment, rng)

    def _mix(self, rng: np.random.Generator, crop: mixing.Crop) -> None:
        """Pastes parts of a crop of any example onto a crop, with the config's probability."""
        chance, choice = rng.random(2)
        if chance < self.augment.mix_probability:
            other = np.empty_like(crop[0]), np.empty_like(crop[1])
            self._draw(int(choice * len(self.dataset.source)), rng, other)
            mask = mixing.MASKS[self.augment.mix](other[1], rng, self.dataset.labels)
            mixing.paste(crop, other, mask)


def _train_source(
    dataset: Dataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None,
) -> _TrainSource:
    fill = mean_pixel(config)
    _check(dataset, fill)
    return _TrainSource(
        dataset=dataset,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        fill=fill,
        seed=seed,
        crop=crop_shape(config),
        scale_range=(config.scale_range[0], config.scale_range[1]),
        flip=config.flip,
        augment=config.augment,
    )


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
        """Bytes of a batch of the smallest images; the real sizes would have to be read."""
        return len(self.rows) * math.prod(self.shape(1, 1)) * (self.dataset.num_channels + 1)

    def batch(self, step: int, empty: Empty) -> EvalBatch:
        indices = [step * self.batch_size + row for row in self.rows]
        examples = [self._read(index) for index in indices if index < len(self.dataset.source)]
        sizes = [(1, 1), *(example["label"].shape for example in examples)]  # a host may have none
        shape = self.shape(*map(max, zip(*sizes, strict=True)))
        num_rows = len(self.rows)
        image = empty((num_rows, *shape, self.dataset.num_channels), np.uint8)
        label = empty((num_rows, *shape), np.uint8)
        index = np.full(num_rows, -1, np.int32)
        size = np.full((num_rows, 2), shape, np.int32)
        name = np.full(num_rows, "", object)
        image[:], label[:] = self.fill, IGNORE
        for i, example in enumerate(examples):
            height, width = size[i] = example["label"].shape
            image[i, :height, :width] = example["image"]
            label[i, :height, :width] = example["label"]
            index[i], name[i] = indices[i], example["name"]
        return {"image": image, "label": label, "index": index, "size": size, "name": name}

    def _read(self, index: int) -> Example:
        example = read_example(self.dataset, index)
        return example if self.transform is None else self.transform(example)
