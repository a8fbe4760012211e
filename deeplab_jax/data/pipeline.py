"""Batches for training and evaluation. The batch at a step depends only on (seed, step).

A run that resumes at a step therefore reads the batches that it would have read, on any number of
hosts and with any number of workers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Int32, Shaped, UInt8

from deeplab_jax.config import DataConfig, crop_shape
from deeplab_jax.data import color, mixing, randomness
from deeplab_jax.data.augment import augment
from deeplab_jax.data.dataset import Dataset, Example, read_example
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.data.prefetch import BatchIterator, empty_arrays
from deeplab_jax.utils.errors import UserError

_NUM_STEPS = 2**40  # the length of the endless sequence of training batches
_SIDE_STEP = 256  # pixels between the padded sides of images that are larger than usual


class Batch(TypedDict):
    """Images with labels, not yet normalized."""

    image: UInt8[np.ndarray, "b h w c"]
    label: UInt8[np.ndarray, "b h w"]  # class ids; `labels.IGNORE` where a pixel does not count


class EvalBatch(Batch):
    """Uncropped images with labels, padded at the bottom and right."""

    index: Int32[np.ndarray, " b"]  # of the example in its data set; -1 for a padding row
    size: Int32[np.ndarray, "b 2"]  # of the image without its padding; a padding row: the batch's
    name: Shaped[np.ndarray, " b"]  # of the example; "" for a padding row


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
      seed: of the order and the augmentation.
      start_step: the step of the first batch.
      rows: the rows of the batch for this host; None: all.

    Raises:
      UserError: the data set is empty, or its number of channels differs from that of
        `config.mean`. The iterator raises one for a damaged example.
    """
    source = _TrainSource(dataset, config, batch_size, seed, rows)
    steps = range(start_step, _NUM_STEPS)
    return BatchIterator(source.make, steps, config.num_workers, source.shapes)


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
    source = _TrainSource(dataset, config, batch_size, seed, rows)
    return source.make(step, empty_arrays(source.shapes))


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
    between hosts; the largest height and width are those of the whole batch, see `pad_batch`.

    Args:
      dataset: the split to evaluate.
      batch_size: number of images per step, over all hosts.
      shape: maps the largest height and width in a batch to the batch's height and width, as
        `square_shape` does. It must never decrease with either. Each result costs a compilation.
      fill: colour of the padding, see `mean_pixel`.
      rows: the rows of each batch for this host, in order; None: all.
      transform: applied to each example before the padding.

    Raises:
      UserError: as `train_batches`.
    """
    _check(dataset, fill)
    own_rows = range(batch_size) if rows is None else rows

    def read(index: int) -> Example:
        example = read_example(dataset, index)
        return example if transform is None else transform(example)

    def make(step: int, _: object) -> EvalBatch:
        indices = [step * batch_size + row for row in own_rows]
        examples = [read(index) for index in indices if index < len(dataset.source)]
        sizes = [(1, 1), *(example["label"].shape for example in examples)]  # a host may have none
        height, width = shape(*map(max, zip(*sizes, strict=True)))
        batch = EvalBatch(
            image=np.full((len(indices), height, width, len(fill)), fill),
            label=np.full((len(indices), height, width), IGNORE, np.uint8),
            index=np.full(len(indices), -1, np.int32),
            size=np.full((len(indices), 2), (height, width), np.int32),
            name=np.full(len(indices), "", object),
        )
        for i, example in enumerate(examples):
            height, width = batch["size"][i] = example["label"].shape
            batch["image"][i, :height, :width] = example["image"]
            batch["label"][i, :height, :width] = example["label"]
            batch["index"][i], batch["name"][i] = indices[i], example["name"]
        return batch

    # In threads: an evaluation ends before processes would pay off.
    return BatchIterator(make, range(num_eval_batches(dataset, batch_size)))


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
            f"config.data.mean has {len(fill)} values, but the images have {dataset.num_channels} "
            "channels: set one value per channel in config.data.mean and config.data.std"
        )


class _TrainSource:
    """Random access to training batches by step. Pickles."""

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None,
    ) -> None:
        self._dataset, self._config = dataset, copy.deepcopy(config)  # a caller may change it
        self._batch_size, self._seed = batch_size, seed
        self._rows = range(batch_size) if rows is None else rows
        self._fill = mean_pixel(config)
        _check(dataset, self._fill)
        shape = (len(self._rows), *crop_shape(config))
        self.shapes = {"image": (*shape, dataset.num_channels), "label": shape}

    def make(self, step: int, out: dict[str, np.ndarray]) -> Batch:
        """Fills arrays of `shapes` with the batch of a step."""
        mix, size = self._config.augment.mix, len(self._dataset.source)
        for image, label, row in zip(out["image"], out["label"], self._rows, strict=True):
            position = step * self._batch_size + row  # in the sequence of epochs
            rng = randomness.generator(self._seed, randomness.AUGMENT, position)
            self._draw(train_index(size, self._seed, position), rng, (image, label))
            if mix:
                rng = randomness.generator(self._seed, randomness.MIX, position)
                self._mix(mixing.MASKS[mix], rng, (image, label))
        return Batch(image=out["image"], label=out["label"])

    def _draw(self, index: int, rng: np.random.Generator, out: mixing.Crop) -> None:
        """Draws a crop of an example into the arrays `out`."""
        example, config = read_example(self._dataset, index), self._config
        augment(
            example["image"],
            example["label"],
            rng,
            crop=crop_shape(config),
            scale_range=config.scale_range,
            flip=config.flip,
            fill=self._fill,
            rotation=config.augment.rotation,
            max_class_share=config.augment.max_class_share,
            out=out,
        )
        color.distort(out[0], config.augment, rng)

    def _mix(self, choose: mixing.Choose, rng: np.random.Generator, crop: mixing.Crop) -> None:
        """Pastes parts of a crop of any example onto a crop, with the config's probability."""
        chance, choice = rng.random(2)
        if chance < self._config.augment.mix_probability:
            other = np.empty_like(crop[0]), np.empty_like(crop[1])
            self._draw(int(choice * len(self._dataset.source)), rng, other)
            mixing.paste(crop, other, choose(other[1], rng, self._dataset.labels))
