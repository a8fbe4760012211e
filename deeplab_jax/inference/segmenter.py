"""`deeplab_jax.load`: a trained model, ready to segment images."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from deeplab_jax.data.io.images import read_image
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.inference.compile import jit_inference, use_compilation_cache
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.weights.convert import read_model
from deeplab_jax.weights.saved_model import SavedModel

# Images of more pixels than this are segmented window by window, unless it is said otherwise.
LARGE = 4_000_000
WINDOW = 1025  # side of those windows, pixels

ImageOrPath = UInt8[np.ndarray, "h w c"] | str | os.PathLike[str]


def load(
    path: str | os.PathLike[str],
    *,
    output_stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | None = None,
) -> Segmenter:
    """Reads a trained model.

    Args:
      path: a workdir of training, of which the best checkpoint is taken; a checkpoint's folder; a
        `.pth` or `.safetensors` file of torchvision's; or a name that torchvision publishes.
      output_stride: 8 to 32 (256 with a cascade), for another than the model was trained with.
      scales: of the image, over which probabilities are averaged.
      flip: average over the mirror image too.
      window: side of the windows, pixels, that images larger than it are segmented in. None:
        `WINDOW` (1025) for images of more than `LARGE` (4 million) pixels, and the whole image for
        others. 0: always the whole image.

    Returns:
      The model with its classes and colours.

    Raises:
      UserError: if there is no model at the path, or a setting cannot be.

    Example:
      >>> segmenter = deeplab_jax.load("runs/voc")  # doctest: +SKIP
      >>> ids = segmenter.predict("photo.jpg")  # int32 [h, w]  # doctest: +SKIP
    """
    mode = TestTimeAugmentation(
        tuple(scales), flip, window or None
    )  # sees whether the settings can be
    use_compilation_cache()
    saved = read_model(path)
    if output_stride is not None:
        architecture = saved.architecture.at_output_stride(output_stride)
        info = saved.info | {"architecture": dataclasses.asdict(architecture)}
        saved = dataclasses.replace(saved, info=info)
    return Segmenter(saved, mode, large_window=WINDOW if window is None else None)


class Segmenter:
    """A trained model; see `load`.

    Attributes:
      path: of the checkpoint or file.
      info: what it says of itself, see `weights.saved_model.describe`.
      labels: names and colours of its classes.
      architecture: of the model, at the output stride that is used.
      model: as pure functions, with fused batch norm (see `FunctionalModel.fused`).
      variables: its arrays, on the default device.
      mean: of the channels, 0..1, with which images are normalised.
      std: likewise.
    """

    def __init__(
        self,
        saved: SavedModel,
        mode: TestTimeAugmentation,
        *,
        large_window: int | None = None,
    ) -> None:
        """Places the model on the device.

        Args:
          saved: the model.
          mode: how images are segmented.
          large_window: side of the windows for images of more than `LARGE` pixels, if not the
            mode's.
        """
        self.path: pathlib.Path = saved.path
        self.info: dict[str, Any] = saved.info
        colors = (tuple(color) for color in saved.info["palette"])
        self.labels = LabelSet(tuple(saved.info["classes"]), tuple(colors))
        self.architecture: Architecture = saved.architecture
        original = FunctionalModel(self.architecture)
        self.model = original.fused
        self.variables: Variables = jax.device_put(original.fuse(saved.variables))
        self.mean: tuple[float, ...] = tuple(saved.info["mean"])
        self.std: tuple[float, ...] = tuple(saved.info["std"])
        self._mode = mode
        self._large_window = large_window or mode.window
        self._inferences: dict[int | None, Predictor] = {}
        self._apply = jit_inference(_logits, self.model)

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class, in the order of ids."""
        return self.labels.names

    @functools.cached_property
    def palette(self) -> UInt8[np.ndarray, "256 3"]:
        """The colour of each id."""
        return self.labels.palette()

    @property
    def num_compilations(self) -> int:
        """Programs that predictions were compiled to so far."""
        return sum(inference.num_compilations for inference in self._inferences.values())

    def predict(self, image: ImageOrPath) -> Int32[np.ndarray, "h w"]:
        """The class id of each pixel, at the image's own size.

        Args:
          image: uint8 `[h, w, c]` of any size, RGB for a model of colours; or an image file's path,
            which is read by `images.read_image`.

        Raises:
          UserError: the file is no image.
          ValueError: the array is no such image.
        """
        pixels = self.read(image)
        return self._inference(pixels).ids(pixels).astype(np.int32)

    def probabilities(self, image: ImageOrPath) -> Float32[np.ndarray, "h w classes"]:
        """The probability of each class at each pixel; see `predict`."""
        pixels = self.read(image)
        return self._inference(pixels).probabilities(pixels)

    def logits(self, images: Float[Array, "n h w c"]) -> Float32[Array, "n h w classes"]:
        """Logits of images that are normalised already: the model itself, at one scale.

        Args:
          images: `(pixel / 255 - mean) / std`.
        """
        return self._apply(self.variables, jnp.asarray(images)).astype(jnp.float32)

    def read(self, image: ImageOrPath) -> UInt8[np.ndarray, "h w c"]:
        """The pixels of an image, with as many channels as the model takes; see `predict`."""
        channels = self.architecture.in_channels
        if isinstance(image, (str, os.PathLike)):
            return read_image(image, channels)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            raise ValueError(
                f"image must be uint8 [height, width, {channels}], got {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        if pixels.size == 0:
            raise ValueError(f"image has no pixels: {list(pixels.shape)}")
        return pixels

    def window_of(self, height: int, width: int) -> int | None:
        """Side of the windows that an image of this size is segmented in; None: it is whole."""
        return self._large_window if height * width > LARGE else self._mode.window

    def _inference(self, pixels: np.ndarray) -> Predictor:
        window = self.window_of(*pixels.shape[:2])
        if window not in self._inferences:
            self._inferences[window] = Predictor(
                self.model,
                self.variables,
                mean=self.mean,
                std=self.std,
                mode=dataclasses.replace(self._mode, window=window),
            )
        return self._inferences[window]


def _logits(model: FunctionalModel, variables: Variables, images: Array) -> Array:
    return model.apply(variables, images)[0]["out"]
