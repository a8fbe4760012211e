"""Predicts image files and writes class ids, overlays and heat maps: `deeplab-jax predict`.

Threads read the next images and write the last ones while the device predicts.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import errno
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from deeplab_jax.data.io.images import read_image, read_size
from deeplab_jax.data.labels import class_counts
from deeplab_jax.inference.files import ImageResult, OutputError
from deeplab_jax.inference.padding import PaddedShape
from deeplab_jax.inference.positive import PositiveClass, choose_ids
from deeplab_jax.inference.predictor import Function, Predictor
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_png
from deeplab_jax.utils.progress import bounded_map
from deeplab_jax.visualization import overlays

# Limits of the images that are read ahead, of those that wait for others of their padded shape, and
# of those that are being written: each a few batches, or two photos of 12 million pixels.
MAX_IMAGES = 16
MAX_PIXELS = 24_000_000

_GREYS = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)


@dataclasses.dataclass
class PipelineImage:
    """An image, or a frame of a video, in the pipeline.

    Its `pixels` are empty if they cannot be read; `predicted` is that of `Predictor.start`, or the
    error of an earlier stage; `seconds` the time of a frame since the first one.
    """

    index: int
    path: pathlib.Path
    pixels: UInt8[np.ndarray, "h w c"]
    shape: PaddedShape | None = None
    predicted: Any = None
    seconds: float = 0.0


def predict_images(
    segmenter: Segmenter,
    inputs: Mapping[pathlib.Path, pathlib.Path],
    *,
    opacity: float = 0.5,
    heatmap_classes: Sequence[int] = (),
    side_by_side: bool = False,
    positive: PositiveClass | None = None,
    unsure: bool = False,
    move: Callable[[pathlib.Path], pathlib.Path | str] | None = None,
) -> Generator[ImageResult | UserError, None, None]:
    """Predicts images and writes their class ids, overlays and other pictures.

    To close the iterator, or to raise an error in it, cancels what is not yet being written.

    Args:
      segmenter: the model.
      inputs: beginning of the paths to write, to which "_ids.png" and others are appended, by the
        path of each image; existing files are replaced.
      opacity: of class colours over the image, 0..1.
      heatmap_classes: ids of the classes whose probabilities are drawn.
      side_by_side: whether to draw the image and its overlay in a row too.
      positive: class that a threshold predicts, if any.
      unsure: whether to write a mask of the unsure pixels, and to hatch them; without `positive`.
      move: moves a finished file and returns its new path, see `buckets.outputs`; called in
        threads, MAX_IMAGES more than otherwise, which mostly wait. Its errors end the prediction.

    Yields:
      The result of each image, in order, or its error: the file is not an image, it does not fit
      in memory, or an output cannot be written. An `OutputError` is the last item.

    Raises:
      UserError: the model cannot be read; or as `move` raises.
    """
    predictor, labels = segmenter.predictor, segmenter.labels
    calibration = segmenter.calibration if unsure else None
    needs_all = bool(heatmap_classes) or calibration is not None
    function: Function = "probabilities" if needs_all else "ids"
    on_device = None if needs_all else positive
    num_values = labels.num_classes if needs_all else 1  # of a pixel's prediction

    def read(item: tuple[int, pathlib.Path]) -> PipelineImage:
        image = PipelineImage(*item, pixels=np.empty((0, 0, 3), np.uint8))
        try:
            channels = segmenter.architecture.in_channels
            image.pixels = read_image(image.path, channels, upright=True)
            image.shape = predictor.padded_shape(image.pixels)
        except UserError as error:
            image.predicted = error
        return image

    def draw(
        pixels: np.ndarray,
        ids: UInt8[np.ndarray, "h w"],
        probabilities: Float[np.ndarray, "h w classes"],
        mask: Bool[np.ndarray, "h w"] | None,
    ) -> Iterator[tuple[str, str, np.ndarray, np.ndarray | None]]:
        """Yields kind, suffix, pixels and palette of each picture: large ones take much memory."""
        yield "ids", "ids", ids, segmenter.palette
        style: dict[str, Any] = {"opacity": opacity, "unsure": mask}
        yield "overlay", "overlay", overlays.overlay(pixels, ids, labels, **style), None
        if side_by_side:
            row = overlays.side_by_side(pixels, ids, labels, **style)
            yield "side_by_side", "side_by_side", row, None
        if mask is not None:
            yield "unsure", "unsure", mask.astype(np.uint8) * 255, _GREYS
        for index in heatmap_classes:
            name = labels.names[index]
            plain = re.sub(r"[^\w-]+", "_", name)
            suffix = plain if plain == name else f"{plain}_{index}"
            heat = overlays.heatmap(pixels, probabilities[..., index], name)
            yield f"heatmap {name}", f"heatmap_{suffix}", heat, None

    def write(image: PipelineImage) -> tuple[int, ImageResult | UserError]:
        if isinstance(image.predicted, UserError):
            error = str(image.predicted).removeprefix(f"{image.path}: ")
            return image.index, UserError(f"{image.path}: {error}")
        mask = num_unsure = None
        if needs_all:
            scores = None if positive is None else image.predicted[..., positive.class_id]
            ids = choose_ids(image.predicted, scores, positive).astype(np.uint8)
            if calibration is not None:
                mask = calibration.sureness(image.predicted, ids) < calibration.threshold
                num_unsure = int(mask.sum())
        else:
            ids = image.predicted[0]
        base, files = inputs[image.path], {}
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            for kind, suffix, picture, palette in draw(image.pixels, ids, image.predicted, mask):
                files[kind] = base.with_name(f"{base.name}_{suffix}.png")
                write_png(files[kind], picture, palette)
        except MemoryError:
            return image.index, UserError(f"{image.path}: its pictures do not fit in memory")
        except OSError as error:
            return image.index, _output_error(image.path, base, error)
        moved = {kind: move(file) if move else file for kind, file in files.items()}
        counts = class_counts(ids, labels.num_classes)
        size = (ids.shape[0], ids.shape[1])
        return image.index, ImageResult(image.path, size, counts, moved, unsure=num_unsure)

    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # there is a thread per CPU already
    num_workers = (os.cpu_count() or 1) + (MAX_IMAGES if move else 0)
    pool = concurrent.futures.ThreadPoolExecutor(num_workers, "images")
    try:
        with warnings.catch_warnings():  # not in the threads, which share the filters
            warnings.simplefilter("ignore")  # about odd but harmless metadata
            sizes = list(pool.map(read_size, inputs))
            predictor.plan([size for size in sizes if size], function, on_device)
            read_ahead = bounded_map(
                *(pool, read, enumerate(inputs)),
                max_items=MAX_IMAGES,
                max_weight=MAX_PIXELS,
                weight=lambda item: math.prod(sizes[item[0]] or (MAX_PIXELS,)),
            )
            _ = segmenter.variables  # raises what is wrong with the model
            written = bounded_map(
                *(pool, write, predict_batches(predictor, read_ahead, function, on_device)),
                max_items=MAX_IMAGES,
                max_weight=MAX_PIXELS / num_values,
                weight=lambda image: math.prod(image.pixels.shape[:2]),
            )
            yield from _in_order(written)
    finally:
        predictor.cancel()
        pool.shutdown(cancel_futures=True)
        cv2.setNumThreads(num_threads)


def _output_error(path: pathlib.Path, base: pathlib.Path, error: OSError) -> UserError:
    """Returns the error of an output; an `OutputError` if the disk is full or read-only."""
    target = str(error.filename2 or error.filename or ".partial")
    target = f"{base}_*.png" if target.endswith(".partial") else target
    kind = OutputError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else UserError
    return kind(f"{path}: cannot write to {target}: {error.strerror or error}")


def _in_order(
    results: Iterable[tuple[int, ImageResult | UserError]],
) -> Iterator[ImageResult | UserError]:
    """Yields the results by index; ends with an `OutputError`, after what is done."""
    waiting: dict[int, ImageResult | UserError] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        if isinstance(result, OutputError):
            yield from (waiting[i] for i in sorted(waiting, key=lambda i: (i == index, i)))
            return
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def predict_batches(
    predictor: Predictor,
    images: Iterable[PipelineImage],
    function: Function,
    positive: PositiveClass | None,
) -> Iterator[PipelineImage]:
    """Predicts images in batches of one padded shape; yields a batch when the next is started."""
    groups: dict[PaddedShape | None, list[PipelineImage]] = {}
    started = collections.deque[tuple[list[PipelineImage], Callable[[], list[Any]]]]()
    # On a CPU, whose processors one batch keeps busy, a second one would only need memory.
    max_started = 0 if predictor.max_batch == 1 else 1

    def finish(max_started: int) -> Iterator[PipelineImage]:
        while len(started) > max_started:
            group, get_predictions = started.popleft()
            for one, predicted in zip(group, get_predictions(), strict=True):
                one.predicted = predicted
                yield one

    def start(group: list[PipelineImage]) -> Iterator[PipelineImage]:
        pixels = [image.pixels for image in group]
        started.append((group, predictor.start(function, pixels, positive)))
        yield from finish(max_started)

    for image in images:
        if image.predicted is not None:  # an error
            yield image
            continue
        groups.setdefault(image.shape, []).append(image)
        waiting = [one for group in groups.values() for one in group]
        if len(groups[image.shape]) >= (image.shape.num_images if image.shape else 1):
            yield from start(groups.pop(image.shape))
        elif len(waiting) >= MAX_IMAGES or sum(one.pixels.size for one in waiting) > 3 * MAX_PIXELS:
            yield from start(groups.pop(waiting[0].shape))
    for group in groups.values():
        yield from start(group)
    yield from finish(0)
