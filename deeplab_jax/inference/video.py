"""Predicts videos and cameras, and writes overlays and areas: `deeplab-jax predict`.

A thread decodes the next frames and others draw the last ones while the device predicts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import itertools
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from deeplab_jax.data.labels import class_counts
from deeplab_jax.inference.files import VideoResult
from deeplab_jax.inference.pipeline import MAX_IMAGES, MAX_PIXELS, PipelineImage, predict_batches
from deeplab_jax.inference.positive import PositiveClass, choose_ids
from deeplab_jax.inference.predictor import MAX_BATCH, Function
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.progress import bounded_map, track
from deeplab_jax.visualization import overlays

CAMERA = r"camera:(\d+)"  # a path that names a camera
_LEGEND_ROWS = 2  # fixed, because the frames of a video have one size
_CODECS = (("mp4v", ".mp4"), ("MJPG", ".avi"))  # in order of preference
_DEFAULT_RATE = 30.0  # frames per second, if a file or camera states none that is possible
_MAX_RATE = 240.0

# Silences OpenCV and its libav about files for which there is a UserError.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class VideoReader:
    """Reads the frames of a video file or a camera, upright and in order.

    Frames have the size of the first one: OpenCV scales others. A camera has no end.

    Attributes:
      num_frames: number of frames that the file states; 0: unknown.
      rate: frames per second, of those that are read; the mean if it varies.
      is_rate_known: whether the file or camera states it.
    """

    def __init__(self, source: pathlib.Path, *, every: int = 1) -> None:
        """Opens a file, or a camera as "camera:0", and decodes the first frame.

        One of `every` frames is read.

        Raises:
          UserError: the video cannot be opened, or no frame can be decoded.
        """
        camera = re.fullmatch(CAMERA, str(source))
        self.is_camera = camera is not None
        reason = "cannot be opened: there is no such camera, or another program uses it"
        if camera:
            self._capture = cv2.VideoCapture(int(camera[1]))
        else:
            reason = (
                "no frame can be decoded: it is no video, is damaged, or OpenCV lacks its codec. "
                "`ffmpeg -i VIDEO new.mp4` may convert it"
            )
            try:
                source.open("rb").close()
            except OSError as error:
                raise UserError(f"cannot be read ({error.strerror})") from None
            # Other backends take some names for patterns of images.
            self._capture = cv2.VideoCapture(str(source), cv2.CAP_FFMPEG)
        self._source, self._every, self._index, self._start = source, every, 0, 0.0
        self._first = self._decode()
        if self._first is None:
            raise UserError(reason)
        self.size = self._first.pixels.shape[:2]
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.is_rate_known = 0 < rate <= _MAX_RATE
        self.rate = (rate if self.is_rate_known else _DEFAULT_RATE) / every
        has_number = self.is_rate_known and not self.is_camera  # it may be a duration * rate
        number = self._capture.get(cv2.CAP_PROP_FRAME_COUNT) if has_number else 0
        self.num_frames = max(0, -(-int(number) // every))

    def read(self) -> PipelineImage | None:
        """Returns the next frame; None at the end, or where the file is damaged beyond reading."""
        frame, self._first = self._first or self._decode(), None
        return frame

    def _decode(self) -> PipelineImage | None:
        for _ in range(self._every - 1 if self._index else 0):
            self._capture.grab()
        is_read, pixels = self._capture.read()
        if not is_read:
            return None
        milliseconds = self._capture.get(cv2.CAP_PROP_POS_MSEC)
        now = time.monotonic() if self.is_camera else milliseconds / 1000
        self._start = self._start if self._index else now
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
        self._index += 1
        return PipelineImage(self._index - 1, self._source, pixels, seconds=now - self._start)


def predict_frames(
    segmenter: Segmenter,
    reader: VideoReader,
    *,
    positive: PositiveClass | None = None,
    smooth: float = 0.0,
    max_frames: int = 0,
) -> Generator[tuple[PipelineImage, UInt8[np.ndarray, "h w"]], None, None]:
    """Yields each frame of a video with its class ids; a bounded number of frames is in memory.

    Without smoothing, the ids are those of `Segmenter.predict`. With it, they are those of a
    running mean `m = smooth * m + (1 - smooth) * p` of the probabilities p, which begins with the
    first frame's; `smooth` is below 1. `max_frames` 0: all frames.

    Raises:
      UserError: frames do not fit on the device, or the model takes others than RGB.
    """
    channels = segmenter.architecture.in_channels
    if channels != 3:
        raise UserError(f"the model takes images of {channels} channels: those of videos are RGB")
    predictor = segmenter.predictor
    function: Function = "probabilities" if smooth else "ids"
    on_device = None if smooth else positive
    predictor.plan([reader.size] * MAX_BATCH, function, on_device)

    def read(_: int) -> PipelineImage | None:
        frame = reader.read()
        if frame is not None:
            frame.shape = predictor.padded_shape(frame.pixels)
        return frame

    pool = concurrent.futures.ThreadPoolExecutor(1, "images")  # in order
    try:
        frames = bounded_map(
            *(pool, read, range(max_frames) if max_frames else itertools.count()),
            max_items=MAX_IMAGES,
            max_weight=MAX_PIXELS,
            weight=lambda _: math.prod(reader.size),
        )
        present: Iterator[Any] = itertools.takewhile(lambda frame: frame is not None, frames)
        mean: Any = None
        for frame in predict_batches(predictor, present, function, on_device):
            predicted, frame.predicted = frame.predicted, None
            if isinstance(predicted, UserError):
                raise predicted
            if smooth:
                mean = predicted if mean is None else smooth * mean + (1 - smooth) * predicted
                scores = None if positive is None else mean[..., positive.class_id]
                yield frame, choose_ids(mean, scores, positive).astype(np.uint8)
            else:
                yield frame, predicted[0]
    finally:
        predictor.cancel()
        pool.shutdown(cancel_futures=True)


def predict_video(
    segmenter: Segmenter,
    source: pathlib.Path,
    base: pathlib.Path,
    *,
    opacity: float = 0.5,
    every: int = 1,
    move: Callable[[pathlib.Path], pathlib.Path | str] | None = None,
    max_frames: int = 0,
    **options: Any,
) -> VideoResult:
    """Predicts a video; writes its overlay, without sound, and the areas of classes by frame.

    Files get their names when they are complete. Ctrl-C ends the recording of a camera. While a
    file is predicted, it raises KeyboardInterrupt, and nothing is written. Frames of a camera are
    repeated or left out in the overlay, so that it takes as long as what it shows.

    Args:
      segmenter, opacity, move: see `pipeline.predict_images`.
      source, every: see `VideoReader`.
      base: beginning of the paths to write, to which "_overlay.mp4" (".avi" if OpenCV lacks MPEG-4)
        and "_areas.csv" are appended; existing files are replaced.
      max_frames, options: of `predict_frames`.

    Raises:
      UserError: the video cannot be predicted, or an output cannot be written. If the file ends
        before the time that it states, this is raised after its frames have been predicted.
    """
    reader = VideoReader(source, every=every)
    labels, rate = segmenter.labels, reader.rate
    frames = predict_frames(segmenter, reader, max_frames=max_frames, **options)

    def draw(
        item: tuple[PipelineImage, np.ndarray],
    ) -> tuple[PipelineImage, np.ndarray, np.ndarray]:
        frame, ids = item
        style: dict[str, Any] = {"opacity": opacity, "num_rows": _LEGEND_ROWS}
        picture = overlays.overlay(frame.pixels, ids, labels, **style)[..., ::-1]
        odd = picture.shape[0] % 2, picture.shape[1] % 2  # sides, which OpenCV would cut
        picture = cv2.copyMakeBorder(picture, 0, odd[0], 0, odd[1], cv2.BORDER_REPLICATE)
        return frame, class_counts(ids, labels.num_classes), picture

    writer, overlay, num_written, varies, seconds = None, base, 0, False, 0.0
    total, num_frames = np.zeros(labels.num_classes, np.int64), 0
    files: dict[str, pathlib.Path | str] = {}
    base.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".partial", f".{base.name[:40]}.", base.parent) as scratch:
        areas = pathlib.Path(scratch) / "areas.csv"
        with (
            areas.open("w", newline="") as table,
            concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "images-drawn") as pool,
            contextlib.closing(frames),
        ):
            rows = csv.writer(table)
            rows.writerow(("frame", "seconds", "class", "share"))
            limits: dict[str, Any] = {"max_items": MAX_IMAGES, "max_weight": MAX_PIXELS}
            drawn = bounded_map(pool, draw, frames, weight=lambda item: item[1].size, **limits)
            expected = max_frames or reader.num_frames
            try:
                for frame, counts, picture in track(drawn, source.name, expected):
                    if writer is None:
                        writer, overlay = _open_writer(areas.parent, rate, picture)
                    end = round(frame.seconds * rate) if reader.is_camera else frame.index
                    while num_written <= end:
                        writer.write(picture)
                        num_written += 1
                    for i in counts.nonzero()[0]:
                        share = counts[i] / counts.sum()
                        row = frame.index, f"{frame.seconds:.3f}", labels.names[i], f"{share:.6f}"
                        rows.writerow(row)
                    step = (frame.seconds - seconds) * rate
                    varies |= not reader.is_camera and frame.index > 0 and abs(step - 1) > 0.5
                    seconds, num_frames, total = frame.seconds, num_frames + 1, total + counts
            except KeyboardInterrupt:
                if not (reader.is_camera and num_frames):
                    raise
        del writer  # ends the file; OpenCV does not report a full disk
        found = cv2.VideoCapture(str(overlay), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)
        if found != num_written:
            raise UserError(f"cannot write to {base}_overlay{overlay.suffix}. Is the disk full?")
        for file in (overlay, areas):
            target = base.with_name(f"{base.name}_{file.name}")
            try:
                os.replace(file, target)
            except OSError as error:
                raise UserError(f"cannot write to {target}: {error.strerror}") from error
            files[file.stem] = move(target) if move else target
    # The stated number may be an estimate from a duration: it counts if the time is short too.
    stated = 0 if max_frames else reader.num_frames
    if num_frames < stated and seconds * rate + 1 < 0.95 * stated:
        raise UserError(
            f"is damaged or incomplete: {num_frames} of {stated} frames could be read. They are in "
            f"{files['overlay']}"
        )
    notes = {
        "its frame rate is unknown, 30 per second were assumed": not reader.is_rate_known,
        "its frame rate varies, that of the overlay is the mean": varies,
        "OpenCV cannot write MPEG-4 here, the overlay is Motion JPEG": overlay.suffix == ".avi",
    }
    about = tuple(note for note, holds in notes.items() if holds)
    return VideoResult(source, reader.size, total, files, num_frames, rate, about)


def _open_writer(
    folder: pathlib.Path, rate: float, picture: UInt8[np.ndarray, "h w 3"]
) -> tuple[cv2.VideoWriter, pathlib.Path]:
    for codec, suffix in _CODECS:
        path = folder / f"overlay{suffix}"
        code = cv2.VideoWriter.fourcc(*codec)
        writer = cv2.VideoWriter(str(path), code, rate, picture.shape[1::-1])
        if writer.isOpened():
            return writer, path
    raise UserError(
        "this OpenCV can write neither MPEG-4 nor Motion JPEG: install the package "
        "opencv-python-headless from PyPI, which can"
    )
