"""Predicts class ids and probabilities of images of any size.

Images are padded to one of few sizes, so that few programs are compiled. The model masks the
padding (see `models.ops.masking`): it does not change the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from deeplab_jax.inference import sliding_window
from deeplab_jax.inference.compilation import Programs, jit_inference
from deeplab_jax.inference.positive import PositiveClass, choose_ids
from deeplab_jax.models.functional import FunctionalModel, Variables, normalize
from deeplab_jax.models.ops.resize import MAX_SIDE, resize_bilinear
from deeplab_jax.utils.errors import UserError

BUCKET = 128  # pixels between padded sides
MIN_WINDOW = 32  # pixels: one feature at output stride 32
LARGE_IMAGE = 4_000_000  # pixels; larger images are cut into windows by default
DEFAULT_WINDOW = 1025  # side of those windows, pixels
WINDOW_BATCH = 2  # windows at once: one of 513 pixels nearly fills a device by itself


@dataclasses.dataclass(frozen=True)
class TestTimeAugmentation:
    """Views of an image that are predicted, and the windows that it is cut into.

    Attributes:
      scales: of the views; their probabilities are averaged.
      flip: whether to average over each view's mirror image too.
      window: side of the windows, pixels, each of which is predicted over all views; 0: predict
        whole images at once. None: `DEFAULT_WINDOW` (1025) for images of more than `LARGE_IMAGE` (4
        million) pixels, 0 for others.
      overlap: smallest fraction of a window that the next one covers too, in [0, 1).

    Raises:
      UserError: a value is out of range.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    overlap: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise UserError(f"scales must be one or more numbers above 0, got {self.scales}")
        if self.window and self.window < MIN_WINDOW:
            raise UserError(
                f"window must be {MIN_WINDOW} pixels or more, or 0 for whole images, got "
                f"{self.window}"
            )
        if not 0 <= self.overlap < 1:
            raise UserError(f"overlap must be 0 or more and below 1, got {self.overlap}")

    def window_of(self, height: int, width: int) -> int:
        """Returns the side of the windows for an image of this size; 0: it is not cut."""
        if self.window is None:
            return DEFAULT_WINDOW if height * width > LARGE_IMAGE else 0
        return self.window


def bucket(side: int) -> int:
    """Rounds a side up to the next of 129, 257, 385, ... pixels.

    Images of sides up to S need at most ceil((S - 1) / 128)^2 programs: 16 for VOC's 500 pixels.
    """
    return BUCKET * max(1, -(-(side - 1) // BUCKET)) + 1


def scaled_side(side: int, scale: float) -> int:
    """Scales a side and rounds it to the nearest pixel, at least 1."""
    return max(1, math.floor(side * scale + 0.5))


def predict_probabilities(
    model: FunctionalModel,
    variables: Variables,
    images: Float[Array, "n h w c"],
    sizes: Int[Array, "n 2"] | None,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Float[Array, "n h w classes"]:
    """Computes the probability of each class at each pixel, averaged over views.

    Each view is the image resized to its `scaled_side` (bilinear, half-pixel centres, no
    antialiasing; unchanged at scale 1). The softmax of the model's logits, at the view's size, is
    resized back and averaged, as in arXiv 1706.05587, section 4.1, and its authors' code.

    Must be called under `jax.jit`: one program then contains the network once per scale.

    Args:
      model: the functions of an architecture.
      variables: its arrays.
      images: normalized pixels; those outside an image's size have no effect.
      sizes: height and width of each image, pixels; None: there is no padding.
      scales: of the views, relative to the image.
      flip: whether to average over mirror images too; each is mirrored within its own width.

    Returns:
      Probabilities; undefined outside an image's size.
    """
    height, width = images.shape[1:3]
    largest = jnp.asarray([height, width])
    sizes = jnp.tile(largest, (len(images), 1)) if sizes is None else jnp.clip(sizes, 1, largest)
    views = []
    for scale in scales:
        view, view_sizes = images, sizes
        if scale != 1:
            view_sizes = _scaled_sizes(sizes, (height, width), scale)
            padded = scaled_side(height, scale), scaled_side(width, scale)
            view = resize_bilinear(images, *padded, in_sizes=sizes, out_sizes=view_sizes)
        directions = [view, _mirror(view, view_sizes)] if flip else [view]
        outputs, _ = model.apply(
            variables,
            jnp.concatenate(directions),
            sizes=jnp.concatenate([view_sizes] * len(directions)),
        )
        result = jax.nn.softmax(outputs["out"], axis=-1)
        if flip:
            straight, mirrored = jnp.split(result, 2)
            result = (straight + _mirror(mirrored, view_sizes)) / 2
        if scale != 1:
            result = resize_bilinear(result, height, width, in_sizes=view_sizes, out_sizes=sizes)
        views.append(result)
    return functools.reduce(jnp.add, views) / len(scales)


def predict_ids(
    model: FunctionalModel,
    variables: Variables,
    images: Float[Array, "n h w c"],
    sizes: Int[Array, "n 2"] | None,
    positive: PositiveClass | None = None,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> tuple[UInt8[Array, "n h w"], Float32[Array, "n h w"] | None]:
    """Computes the class of each pixel, and the probability of the positive class if there is one.

    Without a threshold it is the most probable class; without augmentation, that of the highest
    logit: softmax may round two logits to one probability. The values of `positive` may be traced;
    the other arguments are as of `predict_probabilities`.
    """
    scores = None
    if is_plain := tuple(scales) == (1.0,) and not flip:
        ranked = model.apply(variables, images, sizes=sizes)[0]["out"]
    else:
        ranked = predict_probabilities(model, variables, images, sizes, scales=scales, flip=flip)
    if positive is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1) if is_plain else ranked
        scores = jnp.take(probabilities, positive.class_id, axis=-1).astype(jnp.float32)
    return choose_ids(ranked, scores, positive).astype(jnp.uint8), scores


def _scaled_sizes(
    sizes: Int[Array, "n 2"], padded: tuple[int, int], scale: float
) -> Int[Array, "n 2"]:
    """Looks `scaled_side` up in a table, which is rounded as on the host and not in float32."""
    tables = (jnp.asarray([scaled_side(i, scale) for i in range(side + 1)]) for side in padded)
    return jnp.stack([table[sizes[:, axis]] for axis, table in enumerate(tables)], axis=1)


def _mirror(x: Float[Array, "n h w c"], sizes: Int[Array, "n 2"]) -> Float[Array, "n h w c"]:
    """Mirrors each image left to right within its own width."""
    columns = jnp.maximum(sizes[:, 1:] - 1 - jnp.arange(x.shape[2]), 0)
    return jnp.take_along_axis(x, columns[:, None, :, None], axis=2)


class Predictor:
    """Predicts images of any size, one at a time, on JAX's default device.

    Images are padded to a `bucket` of sizes, or to the window's size, and one program is compiled
    for each padded size. With windows, the network is compiled once for images that fit into one
    window and once for all others; in addition there are two or three small programs for each
    `bucket` of widths. The device holds the probabilities of two batches of windows and two arrays
    `[window, w, classes]`, however high the image is.
    """

    def __init__(
        self,
        model: FunctionalModel,
        variables: Variables,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        tta: TestTimeAugmentation = TestTimeAugmentation(),
    ) -> None:
        """Puts the variables on the device.

        Args:
          model: the functions of an architecture; faster with fused batch norm.
          variables: its arrays.
          mean, std: of the channels, 0..1, for normalization.
          tta: views and windows.
        """
        self._architecture = model.architecture
        self._tta = tta
        self._variables = jax.device_put(variables, jnp.zeros(()).device)

        def network(
            predict: Callable[..., Any],
            model: FunctionalModel,
            variables: Variables,
            images: UInt8[Array, "n h w c"],
            sizes: Int[Array, "n 2"],
            *positive: PositiveClass | None,
        ) -> Any:
            pixels = normalize(images, tuple(mean), tuple(std))
            arguments = variables, pixels, sizes, *positive
            return predict(model, *arguments, scales=tta.scales, flip=tta.flip)

        def windows(*arguments: Any) -> Float[Array, "n h w classes"]:
            *arguments_of_network, weights = arguments
            return network(predict_probabilities, *arguments_of_network) * weights[:, :, None]

        networks: dict[str, Callable[..., Any]] = {
            "ids": functools.partial(network, predict_ids),
            "probabilities": functools.partial(network, predict_probabilities),
            "windows": windows,
        }
        functions = {name: jit_inference(f, model) for name, f in networks.items()}
        functions["add"] = jax.jit(sliding_window.add_windows, donate_argnums=0)
        functions["shift"] = jax.jit(sliding_window.shift_up, donate_argnums=0)
        functions["band ids"] = jax.jit(sliding_window.band_ids)
        self._programs = Programs(functions)

    @property
    def num_compilations(self) -> int:
        """Number of programs compiled so far."""
        return len(self._programs)

    def ids(self, image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w"]:
        """Predicts the class of each pixel; raises as `ids_and_scores` does."""
        return self.ids_and_scores(image, None)[0]

    def ids_and_scores(
        self, image: UInt8[np.ndarray, "h w c"], positive: PositiveClass | None
    ) -> tuple[UInt8[np.ndarray, "h w"], Float32[np.ndarray, "h w"] | None]:
        """Predicts class ids and, if there is a positive class, its probability at each pixel.

        Raises:
          UserError: the image has other channels than the model, or is too large for the device.
        """
        with self._checked(image) as window:
            if window is None:
                return self._predict_at_once("ids", image, positive)
            height, width = image.shape[:2]
            ids = np.empty((height, width), np.uint8)
            if positive is None:
                for rows, band in self._bands(image, window):
                    finished = np.asarray(self._run("band ids", band))
                    ids[rows] = finished[: rows.stop - rows.start, :width]
                return ids, None
            scores = np.empty((height, width), np.float32)
            for rows, sums, probabilities in self._finished(image, window):
                scores[rows] = probabilities[..., positive.class_id]
                ids[rows] = choose_ids(sums, scores[rows], positive)
        return ids, scores

    def probabilities(
        self, image: UInt8[np.ndarray, "h w c"]
    ) -> Float32[np.ndarray, "h w classes"]:
        """Predicts the probability of each class at each pixel; raises as `ids_and_scores` does."""
        with self._checked(image) as window:
            if window is None:
                return self._predict_at_once("probabilities", image)
            shape = *image.shape[:2], self._architecture.num_classes
            result = np.empty(shape, np.float32)
            for rows, _, probabilities in self._finished(image, window):
                result[rows] = probabilities
        return result

    def _finished(
        self, image: np.ndarray, window: int
    ) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yields (rows of the image, weighted sums, probabilities), both `[rows, w, classes]`."""
        height, width = image.shape[:2]
        down, across = (self._total_weights(side, window) for side in (height, width))
        for rows, band in self._bands(image, window):
            sums = jax.device_get(band)[: rows.stop - rows.start, :width]
            yield rows, sums, sums / (down[rows, None, None] * across[:, None])

    @contextlib.contextmanager
    def _checked(self, image: np.ndarray) -> Iterator[int | None]:
        """Checks an image, and converts the error of a full device within the context.

        Yields:
          Side of the windows to cut the image into; None: one prediction is enough.
        """
        channels = self._architecture.in_channels
        valid = image.ndim == 3 and image.shape[2] == channels and image.size > 0
        if not valid or image.dtype != np.uint8:
            raise UserError(
                f"image must be uint8 [h, w, {channels}], got {image.dtype} {list(image.shape)}"
            )
        window, longest = self._tta.window_of(*image.shape[:2]), max(image.shape[:2])
        if not window and bucket(longest) * max(1, *self._tta.scales) > MAX_SIDE:
            raise UserError(
                f"an image of {image.shape[0]}x{image.shape[1]} pixels is too large to be "
                "predicted at once: use windows"
            )
        try:
            yield window if 0 < window < longest else None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"an image of {image.shape[0]}x{image.shape[1]} pixels does not fit in the "
                "device's memory: use windows, or smaller ones, and fewer scales"
            ) from error

    def _predict_at_once(
        self, function: str, image: np.ndarray, *positive: PositiveClass | None
    ) -> Any:
        height, width = image.shape[:2]
        window = self._tta.window_of(height, width)
        shape = (window or bucket(height), window or bucket(width), image.shape[2])
        padded = np.zeros((1, *shape), np.uint8)
        padded[0, :height, :width] = image
        sizes = np.asarray([(height, width)], np.int32)
        result = self._run(function, self._variables, padded, sizes, *positive)
        return jax.tree.map(lambda x: np.asarray(x)[0, :height, :width].copy(), result)

    def _bands(
        self, image: np.ndarray, window: int
    ) -> Iterator[tuple[slice, Float[Array, "window w classes"]]]:
        """Yields (finished rows of the image, band that begins with them), from top to bottom.

        A band holds weighted sums of the windows' probabilities. It is on the device, and its
        memory is reused for the next band.
        """
        height, width = image.shape[:2]
        padded_width = max(bucket(width), window)
        band = jnp.zeros((window, padded_width, self._architecture.num_classes))
        first = 0
        for corners, weighted in self._windows(image, window):
            lefts = np.zeros(WINDOW_BATCH, np.int32)
            lefts[: len(corners)] = [left for _, left in corners]
            for top in dict.fromkeys(top for top, _ in corners):
                if top > first:  # no later window reaches the rows above
                    yield slice(first, top), band
                    band = self._run("shift", band, np.int32(top - first))
                    first = top
                included = np.zeros(WINDOW_BATCH, bool)
                included[: len(corners)] = [corner[0] == top for corner in corners]
                band = self._run("add", band, weighted, lefts, included)
        yield slice(first, height), band

    def _windows(
        self, image: np.ndarray, window: int
    ) -> Iterator[tuple[list[tuple[int, int]], Float[Array, "n window window classes"]]]:
        """Yields (top and left of each window, weighted probabilities) by batch, row by row.

        The last batch may have fewer windows than its probabilities have rows.
        """
        size = [min(window, side) for side in image.shape[:2]]
        sizes = np.full((WINDOW_BATCH, 2), size, np.int32)
        weights = np.zeros((window, window), np.float32)
        weights[: size[0], : size[1]] = np.outer(*map(sliding_window.window_weights, size))
        tops, lefts = (
            sliding_window.window_starts(side, window, self._tta.overlap)
            for side in image.shape[:2]
        )
        corners = [(top, left) for top in tops for left in lefts]
        for start in range(0, len(corners), WINDOW_BATCH):
            batch = corners[start : start + WINDOW_BATCH]
            images = np.zeros((WINDOW_BATCH, window, window, image.shape[2]), np.uint8)
            for row, (top, left) in zip(images, batch, strict=False):
                row[: size[0], : size[1]] = image[top : top + size[0], left : left + size[1]]
            yield batch, self._run("windows", self._variables, images, sizes, weights)

    def _total_weights(self, side: int, window: int) -> Float32[np.ndarray, " side"]:
        """Sums the weights of the windows at each pixel along a side."""
        weights = sliding_window.window_weights(min(window, side))
        total = np.zeros(side, np.float32)
        for start in sliding_window.window_starts(side, window, self._tta.overlap):
            total[start : start + len(weights)] += weights
        return total

    def _run(self, function: str, *arguments: Any) -> Any:
        return self._programs(function, *arguments)
