"""Batches of a data set: the batch at a step is a function of (seed, step) alone.

Nothing is remembered between steps: a run that resumes at a step, on however many hosts and with
however many workers, reads what it would have read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypedDict, TypeVar

import cv2
import grain
import numpy as np
from absl import flags
from jaxtyping import Int32, UInt8

from deeplab_jax import config as config_lib
from deeplab_jax.data import randomness
from deeplab_jax.data.augment import augment
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.utils.errors import UserError

_NUM_STEPS = 2**40  # of a run that is never out of batches
_BUCKET = 256  # pixels between the sides that images larger than usual are padded to
_MAX_THREADS = 8
_BATCHES_IN_FLIGHT = 4  # of each worker at once: made, queued, fetched, copied
_SHARED_MEMORY = pathlib.Path("/dev/shm")


class Batch(TypedDict):
    """Images with labels; not yet normalised.

    Fields:
      image: uint8 `[b, h, w, c]`.
      label: uint8 `[b, h, w]`, class ids; `labels.IGNORE` where a pixel does not count.
    """

    image: UInt8[np.ndarray, "b h w c"]
    label: UInt8[np.ndarray, "b h w"]


class EvalBatch(Batch):
    """Whole images, padded.

    Fields:
      index: int32 `[b]`, of the example in its data set; -1 for a row that fills the last batch.
      size: int32 `[b, 2]`, height and width of the image in its padding; all for such a row.
    """

    index: Int32[np.ndarray, " b"]
    size: Int32[np.ndarray, "b 2"]


def train_batches(
    dataset: Dataset,
    config: config_lib.DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    rows: Sequence[int] | None = None,
) -> Batches[Batch]:
    """Batches of augmented crops from a step on, without end.

    Row r of step s is example number s * batch_size + r of an endless sequence of epochs, each
    of which shows every example once in an order of its own.

    Args:
      dataset: a split to train on.
      config: its crop, scales, flip, mean and number of workers.
      batch_size: over all hosts.
      seed: of order and augmentation.
      start_step: the step of the first batch.
      rows: those of the batch that this host takes; None: all.

    Raises:
      UserError: the data set is empty, or its images have not as many channels as `config.mean`.
        Reading a batch raises one for an example that is damaged.
    """
    fill = mean_pixel(config)
    _check(dataset, fill)
    source = _TrainSource(
        dataset=dataset,
        batch_size=batch_size,
        rows=range(batch_size) if rows is None else rows,
        fill=fill,
        seed=seed,
        crop=config_lib.crop_shape(config),
        scale_range=(config.scale_range[0], config.scale_range[1]),
        flip=config.flip,
    )
    return Batches(source, start_step, config.num_workers)


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    shape: Callable[[int, int], tuple[int, int]],
    fill: UInt8[np.ndarray, " c"],
    num_workers: int,
    rows: Sequence[int] | None = None,
    prepare: Callable[[Example], Example] | None = None,
) -> Batches[EvalBatch]:
    """Each image once, whole and in order, padded at the bottom and right.

    The last batch is filled with rows of index -1, which hold `fill` and `labels.IGNORE`. All
    hosts give the batches of a step the same height and width.

    Args:
      dataset: a split to evaluate on.
      batch_size: over all hosts.
      shape: height and width of a batch, of the largest height and width in it: `square`, or
        another function that gives few shapes, as a program is compiled for each.
      fill: colour of the padding, as `mean_pixel` gives it.
      num_workers: processes; 0: threads of this process, which start at once where a process
        takes seconds.
      rows: those of each batch that this host takes; None: all.
      prepare: what is done to an example before it is padded; None: nothing.

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
        prepare=prepare,
    )
    return Batches(source, 0, min(num_workers, len(source)))


def num_eval_batches(dataset: Dataset, batch_size: int) -> int:
    """Batches that `eval_batches` gives."""
    return math.ceil(len(dataset.source) / batch_size)


def mean_pixel(config: config_lib.DataConfig) -> UInt8[np.ndarray, " c"]:
    """The mean colour, 0..255: what images are padded with, as it is 0 once normalised."""
    return np.clip(np.rint(np.array(config.mean) * 255), 0, 255).astype(np.uint8)


def read(dataset: Dataset, index: int) -> Example:
    """An example, after a look at its shapes and ids.

    Raises:
      UserError: the image and label do not belong together or to this data set.
    """
    example = dataset.source[index]
    image, label, name = example["image"], example["label"], example["name"]
    if image.shape[2:] != (dataset.num_channels,):
        raise UserError(
            f"{name}: the image must be [height, width, {dataset.num_channels}], "
            f"got {list(image.shape)}"
        )
    if label.shape != image.shape[:2]:
        raise UserError(
            f"{name}: the label is {_spell_size(label)} pixels, its image {_spell_size(image)}"
        )
    num_classes = dataset.labels.num_classes
    wrong = label[(label >= num_classes) & (label != IGNORE)]
    if wrong.size:
        raise UserError(
            f"{name}: the label holds the id {wrong[0]}, but the classes are 0 to "
            f"{num_classes - 1}, and {IGNORE} is ignored"
        )
    return example


def _spell_size(array: np.ndarray) -> str:
    return " x ".join(str(side) for side in array.shape[1::-1])


def _check(dataset: Dataset, fill: np.ndarray) -> None:
    if len(dataset.source) == 0:
        raise UserError("the data set holds no images")
    if len(fill) != dataset.num_channels:
        raise UserError(
            f"config.data.mean has {len(fill)} values, but the images have "
            f"{dataset.num_channels} channels: give config.data.mean and std one value a channel"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainSource:
    """Random access to the batches of training, by step."""

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
        """Of a batch."""
        return len(self.rows) * math.prod(self.crop) * (self.dataset.num_channels + 1)

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch_size
        crops = [self._crop(first + row) for row in self.rows]
        images, labels = zip(*crops, strict=True)
        return {"image": np.stack(images), "label": np.stack(labels)}

    def _crop(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        size = len(self.dataset.source)
        epoch, place = divmod(position, size)
        index = int(randomness.permutation(size, self.seed, epoch)[place])
        example = read(self.dataset, index)
        return augment(
            example["image"],
            example["label"],
            randomness.generator(self.seed, randomness.AUGMENT, position),
            crop=self.crop,
            scale_range=self.scale_range,
            flip=self.flip,
            fill=self.fill,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalSource:
    """Random access to the batches of an evaluation."""

    dataset: Dataset
    batch_size: int
    rows: Sequence[int]
    fill: np.ndarray
    shape: Callable[[int, int], tuple[int, int]]
    prepare: Callable[[Example], Example] | None

    def __len__(self) -> int:
        return num_eval_batches(self.dataset, self.batch_size)

    @property
    def nbytes(self) -> int:
        """Of a batch of images like the first."""
        height, width = self.shape(*self._read(0)["label"].shape)
        return len(self.rows) * height * width * (self.dataset.num_channels + 1)

    def __getitem__(self, step: int) -> EvalBatch:
        first = step * self.batch_size
        stop = min(first + self.batch_size, len(self.dataset.source))
        # Other hosts' rows are read too: their sizes decide the shape that all hosts must share.
        examples = [self._read(index) for index in range(first, stop)]
        heights, widths = zip(*(example["label"].shape for example in examples), strict=True)
        shape = self.shape(max(heights), max(widths))
        image = np.empty((len(self.rows), *shape, self.dataset.num_channels), np.uint8)
        image[:] = self.fill
        label = np.full((len(self.rows), *shape), IGNORE, np.uint8)
        index = np.full(len(self.rows), -1, np.int32)
        size = np.full((len(self.rows), 2), shape, np.int32)
        for place, row in enumerate(self.rows):
            if row < len(examples):
                height, width = size[place] = examples[row]["label"].shape
                image[place, :height, :width] = examples[row]["image"]
                label[place, :height, :width] = examples[row]["label"]
                index[place] = first + row
        return {"image": image, "label": label, "index": index, "size": size}

    def _read(self, index: int) -> Example:
        example = read(self.dataset, index)
        return example if self.prepare is None else self.prepare(example)


def square(height: int, width: int, *, size: int) -> tuple[int, int]:
    """A square of side `size`, pixels, or of the next 256 k + 1 where that is too small."""
    longest = max(height, width)
    side = size if longest <= size else _BUCKET * math.ceil((longest - 1) / _BUCKET) + 1
    return side, side


class _Source(Protocol):
    """Random access to batches. Must pickle."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Any: ...

    @property
    def nbytes(self) -> int: ...


B = TypeVar("B", bound=Batch)


class Batches(Iterator[B], Generic[B]):
    """Batches that worker processes, or threads of this process, make ahead of time.

    Work begins at once. `close()`, the end of a `with` block, the end of the batches, any error
    and the end of the program end it.
    """

    def __init__(self, source: _Source, start_step: int, num_workers: int) -> None:
        """With `num_workers` of 0, there is a thread for each CPU."""
        if not flags.FLAGS.is_parsed():  # Grain reads its own, also where absl runs no program
            flags.FLAGS.mark_as_parsed()
        num_threads = 1 if num_workers else min(len(os.sched_getaffinity(0)), _MAX_THREADS)
        dataset = (
            grain.MapDataset.source(source)
            .slice(slice(start_step, None))
            .to_iter_dataset(
                grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
            )
            .mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), _set_up_worker)
        )
        if num_workers and not _fits_shared_memory(source.nbytes * num_workers):
            dataset = grain.experimental.WithOptionsIterDataset(
                dataset, grain.experimental.DatasetOptions(min_shm_size=2**62)
            )
        self._iterator: Any = iter(dataset)
        self._close = weakref.finalize(self, _close, self._iterator)
        self._iterator.get_state()  # makes all workers: otherwise closing may miss some
        with _signals_blocked():
            self._iterator.start_prefetch()

    def __next__(self) -> B:
        if self._iterator is None:
            raise StopIteration
        try:
            batch: Any = next(self._iterator)
        except (UserError, StopIteration) as error:
            # The traceback leads to frames of Grain's that hold a batch in shared memory.
            end = error.with_traceback(None)
        except BaseException:
            self.close()
            raise
        else:
            # A worker's arrays lie in shared memory, which is to be free again soon.
            return {name: np.array(array) for name, array in batch.items()}  # type: ignore
        self.close()
        raise end

    def close(self) -> None:
        """Ends the workers and waits for them. There are no batches afterwards."""
        self._iterator = None
        self._close()

    def __enter__(self) -> Batches[B]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(iterator: Any) -> None:
    iterator.close()
    # Grain leaves batches in shared memory, held by reference cycles, and frees them in a thread.
    # A program that ends before that is told of a leak.
    gc.collect()
    time.sleep(0.05)


def _fits_shared_memory(nbytes: int) -> bool:
    """Whether batches may pass from workers through shared memory.

    A container's is often 64 MiB, and a worker that writes past it dies of SIGBUS. Batches then
    pass through pipes, at the price of a copy.
    """
    if not _SHARED_MEMORY.is_dir():
        return True
    return nbytes * _BATCHES_IN_FLIGHT < shutil.disk_usage(_SHARED_MEMORY).free


# Ctrl-C and SIGTERM often go to all processes of a group. The training process alone decides what
# to do then, and may want another batch: workers that died, each with a traceback, would break it.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Threads and processes started within keep the signals blocked, from their first moment.

    Python starts one process of its own for the first semaphore, and unblocks the signals then:
    the semaphores must exist already.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _set_up_worker(worker: int, num_workers: int) -> None:
    del worker, num_workers
    cv2.setNumThreads(0)  # one process a core is the division of work
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this worker when the training process is gone, also by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
