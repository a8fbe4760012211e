"""Probabilities and class ids of images of any size: whole, over scales and mirrored, by windows.

Images are padded to few sizes, so that few programs are compiled. The model masks the padding (see
`models.ops.masking`): each result is that of the image alone.
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
from jaxtyping import Array, Float, Float32, Int, Num, UInt8

from deeplab_jax.inference import sliding_window as windows
from deeplab_jax.inference.compile import jit_inference
from deeplab_jax.models.functional import FunctionalModel, Variables, normalize
from deeplab_jax.models.ops.resize import MAX_SIDE, resize_bilinear
from deeplab_jax.utils.errors import UserError

BUCKET = 128  # pixels between padded sides
MIN_WINDOW = 32  # pixels: one of the features at the largest output stride
WINDOWS_AT_ONCE = 2  # a window of 513 pixels nearly fills a device by itself


@dataclasses.dataclass(frozen=True)
class TestTimeAugmentation:
    """How an image is predicted.

    Attributes:
      scales: at which it is predicted; the mean of the probabilities counts.
      flip: whether the mirror image's probabilities count too.
      window: side of the windows that it is cut into, pixels; None: the whole image at once. Each
        window is predicted over all scales and directions.
      overlap: share of a window that its neighbour covers too, at least, in [0, 1).

    Raises:
      UserError: a value that cannot be.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    overlap: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise UserError(f"scales must be one or more numbers above 0, got {self.scales}")
        if self.window is not None and self.window < MIN_WINDOW:
            raise UserError(f"window must be {MIN_WINDOW} pixels or more, got {self.window}")
        if not 0 <= self.overlap < 1:
            raise UserError(f"overlap must be 0 or more and below 1, got {self.overlap}")


def bucket(side: int) -> int:
    """The padded side of an image's: the next of 129, 257, 385, ... pixels.

    So images of sides up to S need at most ceil((S - 1) / 128)^2 programs: 16 for VOC's 500 pixels.
    """
    return BUCKET * max(1, -(-(side - 1) // BUCKET)) + 1


def scaled_side(side: int, scale: float) -> int:
    """Pixels of a side at a scale: the nearest, at least 1."""
    return max(1, math.floor(side * scale + 0.5))


def probabilities(
    model: FunctionalModel,
    variables: Variables,
    images: Num[Array, "n h w c"],
    sizes: Int[Array, "n 2"] | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Float[Array, "n h w classes"]:
    """Probabilities of each class at each pixel, averaged over scales and mirror images.

    At each scale the image is resized to `scaled_side` of its own size, bilinearly (half-pixel
    centres, no antialiasing; not at all at scale 1). The model's logits, which have the resized
    image's size, become probabilities by softmax there; these are resized back and averaged, as in
    arXiv 1706.05587, section 4.1, and its authors' code.

    To be jitted: the scales share one program, which holds the network once a scale.

    Args:
      model: an architecture's functions.
      variables: its arrays.
      images: pixels 0..255; what lies beyond an image's size does not matter.
      sizes: height and width of each image, pixels; None: nothing is padding.
      mean, std: of the channels, 0..1.
      scales: relative to the image's size.
      flip: whether each view is predicted mirrored too, within its own width.

    Returns:
      What lies beyond an image's size has no meaning.
    """
    pixels = normalize(images, tuple(mean), tuple(std))
    whole = jnp.asarray(pixels.shape[1:3])
    sizes = jnp.tile(whole, (len(pixels), 1)) if sizes is None else jnp.clip(sizes, 1, whole)
    views = (_probabilities_at(scale, model, variables, pixels, sizes, flip) for scale in scales)
    return functools.reduce(jnp.add, views) / len(scales)


def class_ids(
    model: FunctionalModel,
    variables: Variables,
    images: Num[Array, "n h w c"],
    sizes: Int[Array, "n 2"] | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> UInt8[Array, "n h w"]:
    """The class of the highest probability at each pixel; arguments as of `probabilities`.

    At scale 1 alone it is that of the model's highest logit, whose order softmax could round away.
    """
    if tuple(scales) == (1.0,) and not flip:
        pixels = normalize(images, tuple(mean), tuple(std))
        scores = model.apply(variables, pixels, sizes=sizes)[0]["out"]
    else:
        scores = probabilities(
            model, variables, images, sizes, mean=mean, std=std, scales=scales, flip=flip
        )
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8)


def _weighted_probabilities(
    model: FunctionalModel,
    variables: Variables,
    images: Num[Array, "n h w c"],
    sizes: Int[Array, "n 2"],
    weights: Float[Array, "h w"],
    **options: Any,
) -> Float[Array, "n h w classes"]:
    return probabilities(model, variables, images, sizes, **options) * weights[:, :, None]


def _probabilities_at(
    scale: float,
    model: FunctionalModel,
    variables: Variables,
    pixels: Float[Array, "n h w c"],
    sizes: Int[Array, "n 2"],
    flip: bool,
) -> Float[Array, "n h w classes"]:
    height, width = pixels.shape[1:3]
    view, view_sizes = pixels, sizes
    if scale != 1:
        view_sizes = _scaled_sizes(sizes, (height, width), scale)
        padded = scaled_side(height, scale), scaled_side(width, scale)
        view = resize_bilinear(pixels, *padded, in_sizes=sizes, out_sizes=view_sizes)
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
    return result


def _scaled_sizes(
    sizes: Int[Array, "n 2"], padded: tuple[int, int], scale: float
) -> Int[Array, "n 2"]:
    """`scaled_side` of each, from a table: rounded as on the host, not as float32 would."""
    tables = (jnp.asarray([scaled_side(i, scale) for i in range(side + 1)]) for side in padded)
    return jnp.stack([table[sizes[:, axis]] for axis, table in enumerate(tables)], axis=1)


def _mirror(x: Float[Array, "n h w c"], sizes: Int[Array, "n 2"]) -> Float[Array, "n h w c"]:
    """Each image mirrored left to right within its own width."""
    columns = jnp.maximum(sizes[:, 1:] - 1 - jnp.arange(x.shape[2]), 0)
    return jnp.take_along_axis(x, columns[:, None, :, None], axis=2)


class Predictor:
    """Predicts images of any size, one at a time, on jax's default device.

    Images are padded to a `bucket` of sizes, or to the window's; one program is compiled for each
    padded size that occurs. By windows the network is in one program for images that one window
    holds, and in one for all others, whatever their size; beside it there are two small ones, or
    three, for each `bucket` of widths. The device then holds the probabilities of two batches of
    windows and, twice, of one row of windows, `[window, w, classes]`: no more for higher images.
    """

    def __init__(
        self,
        model: FunctionalModel,
        variables: Variables,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        mode: TestTimeAugmentation = TestTimeAugmentation(),
    ) -> None:
        """Places the variables on the device.

        Args:
          model: an architecture's functions; with fused batch norm they are faster.
          variables: its arrays.
          mean, std: of the channels, 0..1.
          mode: how each image is predicted.
        """
        self._architecture = model.architecture
        self._mode = mode
        self._variables = jax.device_put(variables, jnp.zeros(()).device)
        options: dict[str, Any] = {
            "mean": tuple(mean),
            "std": tuple(std),
            "scales": mode.scales,
            "flip": mode.flip,
        }
        networks: dict[str, Callable[..., Array]] = {
            "ids": class_ids,
            "probabilities": probabilities,
            "windows": _weighted_probabilities,
        }
        self._functions = {
            name: jit_inference(functools.partial(function, **options), model)
            for name, function in networks.items()
        }
        self._functions["add"] = jax.jit(windows.add_windows, donate_argnums=0)
        self._functions["shift"] = jax.jit(windows.shift_up, donate_argnums=0)
        self._functions["band ids"] = jax.jit(windows.band_ids)
        self._programs: dict[tuple[Any, ...], Any] = {}

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def ids(self, image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w"]:
        """The class of each pixel.

        Raises:
          UserError: not an image of the model's channels, or too large for the device at once.
        """
        self._check(image)
        height, width = image.shape[:2]
        with _memory_of_the_device(image):
            if self._at_once(height, width):
                return self._whole("ids", image)
            ids = np.empty((height, width), np.uint8)
            for rows, band in self._bands(image):
                finished = np.asarray(self._run("band ids", band))
                ids[rows] = finished[: rows.stop - rows.start, :width]
        return ids

    def probabilities(
        self, image: UInt8[np.ndarray, "h w c"]
    ) -> Float32[np.ndarray, "h w classes"]:
        """Probability of each class at each pixel; raises as `ids` does."""
        self._check(image)
        height, width = image.shape[:2]
        with _memory_of_the_device(image):
            if self._at_once(height, width):
                return self._whole("probabilities", image)
            down, across = self._total_weights(height), self._total_weights(width)
            result = np.empty((height, width, self._architecture.num_classes), np.float32)
            for rows, band in self._bands(image):
                finished = jax.device_get(band)[: rows.stop - rows.start, :width]
                np.divide(finished, down[rows, None, None] * across[:, None], out=result[rows])
        return result

    def _at_once(self, height: int, width: int) -> bool:
        window = self._mode.window
        return window is None or max(height, width) <= window

    def _whole(self, function: str, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        window = self._mode.window
        padded = np.zeros(
            (1, window or bucket(height), window or bucket(width), image.shape[2]), np.uint8
        )
        padded[0, :height, :width] = image
        sizes = np.asarray([(height, width)], np.int32)
        result = self._run(function, self._variables, padded, sizes)
        return np.asarray(result)[0, :height, :width].copy()

    def _bands(self, image: np.ndarray) -> Iterator[tuple[slice, Float[Array, "window w classes"]]]:
        """(rows of the image, band whose first rows they are), from the top to the bottom.

        A band holds weighted sums of the windows' probabilities. It lies on the device, which uses
        its memory again when the next one is asked for.
        """
        assert self._mode.window is not None
        window = self._mode.window
        height, width = image.shape[:2]
        padded_width = max(bucket(width), window)
        band = jnp.zeros((window, padded_width, self._architecture.num_classes))
        first = 0
        for places, weighted in self._windows(image):
            lefts = np.zeros(WINDOWS_AT_ONCE, np.int32)
            lefts[: len(places)] = [left for _, left in places]
            for top in dict.fromkeys(top for top, _ in places):
                if top > first:  # no later window reaches what lies above it
                    yield slice(first, top), band
                    band = self._run("shift", band, np.int32(top - first))
                    first = top
                included = np.zeros(WINDOWS_AT_ONCE, bool)
                included[: len(places)] = [place[0] == top for place in places]
                band = self._run("add", band, weighted, lefts, included)
        yield slice(first, height), band

    def _windows(self, image: np.ndarray) -> Iterator[tuple[list[tuple[int, int]], Array]]:
        """((top, left) of each window, weighted probabilities) of a batch, row by row.

        The last batch may have fewer windows than its probabilities have rows.
        """
        assert self._mode.window is not None
        window, overlap = self._mode.window, self._mode.overlap
        size = [min(window, side) for side in image.shape[:2]]
        sizes = np.full((WINDOWS_AT_ONCE, 2), size, np.int32)
        weights = np.zeros((window, window), np.float32)
        weights[: size[0], : size[1]] = np.outer(*map(windows.window_weights, size))
        tops, lefts = (windows.window_starts(side, window, overlap) for side in image.shape[:2])
        places = [(top, left) for top in tops for left in lefts]
        for start in range(0, len(places), WINDOWS_AT_ONCE):
            batch = places[start : start + WINDOWS_AT_ONCE]
            images = np.zeros((WINDOWS_AT_ONCE, window, window, image.shape[2]), np.uint8)
            for row, (top, left) in zip(images, batch, strict=False):
                row[: size[0], : size[1]] = image[top : top + size[0], left : left + size[1]]
            yield batch, self._run("windows", self._variables, images, sizes, weights)

    def _total_weights(self, side: int) -> Float32[np.ndarray, " side"]:
        """Sum of the weights of the windows along a side."""
        assert self._mode.window is not None
        weights = windows.window_weights(min(self._mode.window, side))
        total = np.zeros(side, np.float32)
        for start in windows.window_starts(side, self._mode.window, self._mode.overlap):
            total[start : start + len(weights)] += weights
        return total

    def _run(self, function: str, *arguments: Any) -> Array:
        key = (function, *(np.shape(x) for x in arguments if not isinstance(x, Variables)))
        if key not in self._programs:
            self._programs[key] = self._functions[function].lower(*arguments).compile()
        return self._programs[key](*arguments)

    def _check(self, image: np.ndarray) -> None:
        channels = self._architecture.in_channels
        valid = image.ndim == 3 and image.shape[2] == channels and image.size > 0
        if not valid or image.dtype != np.uint8:
            raise UserError(
                f"image must be uint8 [h, w, {channels}], got {image.dtype} {list(image.shape)}"
            )
        largest = bucket(max(image.shape[:2])) * max(1, *self._mode.scales)
        if self._mode.window is None and largest > MAX_SIDE:
            raise UserError(
                f"an image of {image.shape[0]}x{image.shape[1]} pixels is too large to be "
                "predicted at once: use windows"
            )


@contextlib.contextmanager
def _memory_of_the_device(image: np.ndarray) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"an image of {image.shape[0]}x{image.shape[1]} pixels does not fit in the device's "
            "memory: use windows, or smaller ones, and fewer scales"
        ) from error
