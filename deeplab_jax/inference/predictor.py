"""Predicts class ids and probabilities of images of any size.

Images are padded to one of few sizes, so that few programs are compiled. The model masks the
padding (see `models.ops.masking`): it does not change the result.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from deeplab_jax.inference import sliding_window
from deeplab_jax.inference.compilation import Programs, jit_inference
from deeplab_jax.inference.padding import BUCKET, PaddedShape, bucket, plan_shapes
from deeplab_jax.inference.positive import PositiveClass, choose_ids
from deeplab_jax.inference.views import predict_ids, predict_probabilities
from deeplab_jax.models.functional import FunctionalModel, Variables, normalize
from deeplab_jax.models.ops.resize import MAX_SIDE
from deeplab_jax.utils.errors import UserError, print_warning

MIN_WINDOW = 32  # pixels: one feature at output stride 32
LARGE_IMAGE = 4_000_000  # pixels; larger images are cut into windows by default
DEFAULT_WINDOW = 1025  # side of those windows, pixels
WINDOW_BATCH = 2  # windows at once: one of 513 pixels nearly fills a device by itself
MAX_BATCH = 8  # images at once on accelerators; a CPU is as fast with one

# Pixels whose prediction takes as long as compiling one of several programs. On two cores, a
# program takes 4 s of them and a pixel 7.5 us (ResNet-50, output stride 8), or 1.3 s and 0.4 us
# (a quarter of its channels). On a GPU, a program takes 3 s beside others, and a pixel 8 ns.
CPU_PROGRAM_PIXELS = 700_000
ACCELERATOR_PROGRAM_PIXELS = 400_000_000

Function = Literal["ids", "probabilities"]


@dataclasses.dataclass(frozen=True)
class TestTimeAugmentation:
    """Views of an image that are predicted, and the windows that it is cut into.

    Attributes:
      scales: of the views; their probabilities are averaged.
      flip: whether to average over each view's mirror image too.
      window: side of the windows, pixels, each of which is predicted over all views; 0: predict
        whole images. None: `DEFAULT_WINDOW` (1025) for images of more than `LARGE_IMAGE` (4
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


class Predictor:
    """Predicts images of any size on JAX's default device.

    Images are padded to a `bucket` of sizes, or to the window's size, and one program is compiled
    for each padded size; `plan` chooses fewer for images whose sizes are known, and how many of
    them are predicted at once. The device holds the probabilities of two batches of windows and two
    arrays `[window, w, classes]`, however high the image is.

    Attributes:
      max_batch: largest number of images at once; halved when the device's memory is full.
    """

    def __init__(
        self,
        model: FunctionalModel,
        variables: Variables | Callable[[], Variables],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        tta: TestTimeAugmentation = TestTimeAugmentation(),
    ) -> None:
        """Compiles nothing yet.

        `variables`, or the function that returns them, are used by the first prediction. `mean` and
        `std` of the channels, 0..1, normalize images. Models with fused batch norm are faster.
        """
        self._architecture = model.architecture
        self._model = model
        self._tta = tta
        self._is_cpu = jax.default_backend() == "cpu"
        self.max_batch = 1 if self._is_cpu else MAX_BATCH
        self._planned: dict[tuple[int, int], PaddedShape] = {}
        self._get_variables = variables if callable(variables) else lambda: variables
        self._device = jax.device_put(np.float32(0)).device  # the default in this thread
        views: dict[str, Any] = {"scales": tta.scales, "flip": tta.flip}

        def network(
            function: Function,
            model: FunctionalModel,
            variables: Variables,
            images: UInt8[Array, "n h w c"],
            sizes: Any,
            positive: PositiveClass | None = None,
        ) -> Any:
            pixels = normalize(images, tuple(mean), tuple(std))
            if function == "ids":
                return predict_ids(model, variables, pixels, sizes, positive, **views)
            return predict_probabilities(model, variables, pixels, sizes, **views)

        def windows(*arguments: Any) -> Float[Array, "n h w classes"]:
            *arguments_of_network, weights = arguments
            return network("probabilities", *arguments_of_network) * weights[:, :, None]

        self._programs = Programs(
            {
                "ids": jit_inference(functools.partial(network, "ids"), model),
                "probabilities": jit_inference(functools.partial(network, "probabilities"), model),
                "windows": jit_inference(windows, model),
                "add window": jax.jit(sliding_window.add_window, donate_argnums=0),
                "band ids": jax.jit(lambda band: jnp.argmax(band, axis=-1).astype(jnp.uint8)),
            }
        )

    @functools.cached_property
    def _variables(self) -> Variables:
        return jax.device_put(self._get_variables(), self._device)

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
        return self._predict("ids", image, positive)

    def probabilities(
        self, image: UInt8[np.ndarray, "h w c"]
    ) -> Float32[np.ndarray, "h w classes"]:
        """Predicts the probability of each class at each pixel; raises as `ids_and_scores` does."""
        return self._predict("probabilities", image)

    def _predict(
        self, function: Function, image: np.ndarray, positive: PositiveClass | None = None
    ) -> Any:
        (result,) = self.start(function, [image], positive)()
        if isinstance(result, UserError):
            raise result
        return result

    def plan(
        self,
        sizes: Iterable[tuple[int, int]],
        function: Function,
        positive: PositiveClass | None = None,
    ) -> None:
        """Chooses padded shapes for images of these sizes, and compiles for them in threads.

        On a CPU, padded sides are multiples of 8 pixels: most programs are for one size of images,
        and padding would cost time. On accelerators they are those of `bucket`, which other runs
        find in the cache. The other arguments are those of `start`.
        """
        window, tta = self._tta.window, self._tta
        keys = [key for size in sizes if (key := self._key(*size))]
        program_pixels = CPU_PROGRAM_PIXELS if self._is_cpu else ACCELERATOR_PROGRAM_PIXELS
        self._planned = plan_shapes(
            keys,
            multiple=1 if window else 8 if self._is_cpu else BUCKET,
            program_pixels=program_pixels / (sum(s * s for s in tta.scales) * (1 + tta.flip)),
            max_images=self.max_batch,
            max_pixels=LARGE_IMAGE,
        )
        array = functools.partial(
            jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(self._device)
        )
        for shape in dict.fromkeys(map(self._planned.__getitem__, keys)):
            images = array((*shape, self._architecture.in_channels), np.uint8)
            image_sizes = array((shape.num_images, 2), np.int32)
            self._programs.prepare(function, self._model.abstract, images, image_sizes, positive)

    def cancel(self) -> None:
        """Forgets the programs of `plan` that nothing has begun to compile."""
        self._programs.cancel()

    def padded_shape(self, image: np.ndarray) -> PaddedShape | None:
        """Returns the shape of the program for an image; None: the image is cut into windows.

        Raises:
          UserError: the image is not valid, or too large to be predicted at once.
        """
        channels = self._architecture.in_channels
        valid = image.ndim == 3 and image.shape[2] == channels and image.size > 0
        if not valid or image.dtype != np.uint8:
            raise UserError(
                f"image must be uint8 [height, width, {channels}], got {image.dtype} "
                f"{list(image.shape)}" + ", which has no pixels" * (image.size == 0)
            )
        height, width = image.shape[:2]
        window, key = self._tta.window_of(height, width), self._key(height, width)
        if key is None and window:
            return None
        if key is None:
            raise UserError(
                f"an image of {height}x{width} pixels is too large to be predicted at once: use "
                "windows"
            )
        default = PaddedShape(1, *(key if window else map(bucket, key)))
        shape = self._planned.get(key, default)
        return shape._replace(num_images=min(shape.num_images, self.max_batch))

    def _key(self, height: int, width: int) -> tuple[int, int] | None:
        """Returns the size for which a shape is planned: the window's if the image fits into one.

        None: the image cannot be predicted at once, or is not to be.
        """
        longest, window = max(height, width), self._tta.window_of(height, width)
        if window:
            return (window, window) if longest <= window else None
        fits = bucket(longest) * max(1, *self._tta.scales) <= MAX_SIDE
        return (height, width) if fits else None

    def start(
        self,
        function: Function,
        images: Sequence[UInt8[np.ndarray, "h w c"]],
        positive: PositiveClass | None = None,
    ) -> Callable[[], list[Any]]:
        """Begins to predict images of one `padded_shape`, and does not wait for the device.

        Returns:
          A function that waits for the predictions and returns that of each image: what
          `ids_and_scores` or `probabilities` returns, or the UserError of a full device. Before it
          gives up, it predicts fewer images at once, and so do all later calls.
        """
        shape = self.padded_shape(images[0])
        if shape is None:
            return lambda: [self._predict_in_windows(function, image, positive) for image in images]
        if len(images) > (number := shape.num_images):
            parts = [images[i : i + number] for i in range(0, len(images), number)]
            started = [self.start(function, part, positive) for part in parts]
            return lambda: [result for finish in started for result in finish()]
        padded = np.zeros((*shape, images[0].shape[2]), np.uint8)
        sizes = np.zeros((number, 2), np.int32)
        for row, image in enumerate(images):
            sizes[row] = image.shape[:2]
            padded[row, : image.shape[0], : image.shape[1]] = image
        try:
            result = self._programs(function, self._variables, padded, sizes, positive)
        except jax.errors.JaxRuntimeError as error:
            result = error

        def finish() -> list[Any]:
            try:
                if isinstance(result, Exception):
                    raise result
                arrays = jax.device_get(result)
            except jax.errors.JaxRuntimeError as error:
                full = _memory_error(images[0], error)
                if number == 1:
                    return [full]
                if self.max_batch >= number:
                    self.max_batch = number // 2
                    print_warning(
                        f"the device's memory is full: from here on, {self.max_batch} of these "
                        "images at once"
                    )
                return self.start(function, images, positive)()
            return [
                jax.tree.map(lambda x, i=i, h=h, w=w: x[i, :h, :w].copy(), arrays)
                for i, (h, w) in enumerate(sizes[: len(images)])
            ]

        return finish

    def _predict_in_windows(
        self, function: Function, image: np.ndarray, positive: PositiveClass | None
    ) -> Any:
        """Predicts an image window by window; returns what `start` says."""
        height, width = image.shape[:2]
        window, overlap = self._tta.window_of(height, width), self._tta.overlap
        ids, scores, probabilities = np.empty((height, width), np.uint8), None, None
        if function == "probabilities":
            shape = height, width, self._architecture.num_classes
            probabilities = np.empty(shape, np.float32)
        elif positive is not None:
            scores = np.empty((height, width), np.float32)
        down, across = (
            sliding_window.total_weights(side, window, overlap) for side in (height, width)
        )
        try:
            for rows, band in self._bands(image, window):
                if probabilities is None and scores is None:
                    finished = np.asarray(self._programs("band ids", band))
                    ids[rows] = finished[: rows.stop - rows.start, :width]
                    continue
                sums = jax.device_get(band)[: rows.stop - rows.start, :width]
                averages = sums / (down[rows, None, None] * across[:, None])
                if probabilities is not None:
                    probabilities[rows] = averages
                elif scores is not None and positive is not None:
                    scores[rows] = averages[..., positive.class_id]
                    ids[rows] = choose_ids(sums, scores[rows], positive)
        except jax.errors.JaxRuntimeError as error:
            return _memory_error(image, error)
        return (ids, scores) if probabilities is None else probabilities

    def _bands(
        self, image: np.ndarray, window: int
    ) -> Iterator[tuple[slice, Float[Array, "window w classes"]]]:
        """Yields (finished rows of the image, band that begins with them), from top to bottom.

        A band holds weighted sums of the windows' probabilities. It is on the device, and its
        memory is reused for the next band.
        """
        sides = image.shape[:2]
        size = [min(window, side) for side in sides]
        sizes = np.full((WINDOW_BATCH, 2), size, np.int32)
        weights = np.zeros((window, window), np.float32)
        weights[: size[0], : size[1]] = np.outer(*map(sliding_window.window_weights, size))
        starts = [sliding_window.window_starts(side, window, self._tta.overlap) for side in sides]
        corners = list(itertools.product(*starts))
        padded_width = max(bucket(sides[1]), window)
        shape = window, padded_width, self._architecture.num_classes
        band, first = jnp.zeros(shape, device=self._device), 0
        for start in range(0, len(corners), WINDOW_BATCH):
            batch = corners[start : start + WINDOW_BATCH]
            images = np.zeros((WINDOW_BATCH, window, window, image.shape[2]), np.uint8)
            for row, (top, left) in zip(images, batch, strict=False):
                row[: size[0], : size[1]] = image[top : top + size[0], left : left + size[1]]
            weighted = self._programs("windows", self._variables, images, sizes, weights)
            for index, (top, left) in enumerate(batch):
                if top > first:  # no later window reaches the rows above
                    yield slice(first, top), band
                place = np.array([index, top - first, left], np.int32)
                band, first = self._programs("add window", band, weighted, place), top
        yield slice(first, sides[0]), band


def _memory_error(image: np.ndarray, error: jax.errors.JaxRuntimeError) -> UserError:
    """Returns the error of an image that does not fit on a device; raises any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return UserError(
        f"an image of {image.shape[0]}x{image.shape[1]} pixels does not fit in the device's "
        "memory: use windows, or smaller ones, and fewer scales"
    )
