"""`deeplab_jax.load` and the trained model that it returns."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from deeplab_jax.data.io.images import read_image
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.inference.compilation import jit_inference, use_compilation_cache
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.paths import required_path
from deeplab_jax.weights.convert import read_model
from deeplab_jax.weights.saved_model import SavedModel

LARGE_IMAGE = 4_000_000  # pixels; larger images are segmented in windows by default
DEFAULT_WINDOW = 1025  # side of those windows, pixels

ImageOrPath = UInt8[np.ndarray, "h w c"] | str | os.PathLike[str]


def load(
    path: str | os.PathLike[str],
    *,
    output_stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | None = None,
) -> Segmenter:
    """Loads a trained model.

    Args:
      path: a workdir of training, whose best checkpoint is loaded; a checkpoint's folder; a `.pth`
        or `.safetensors` file of torchvision's; or the name of weights that torchvision publishes.
      output_stride: 8 to 32 (256 with a cascade); None: that of training.
      scales: of the image; probabilities are averaged over them.
      flip: average over the mirror image too.
      window: side, pixels, of the windows that larger images are cut into. 0: never cut an image.
        None: `DEFAULT_WINDOW` (1025) for images of more than `LARGE_IMAGE` (4 million) pixels, and
        no windows for others.

    Returns:
      The model with its classes and colours.

    Raises:
      UserError: there is no model at the path, or an argument is invalid.

    Example:
      >>> segmenter = deeplab_jax.load("runs/voc")  # doctest: +SKIP
      >>> ids = segmenter.predict("photo.jpg")  # int32 [h, w]  # doctest: +SKIP
    """
    tta = TestTimeAugmentation(tuple(scales), flip, window or None)  # checks the arguments first
    use_compilation_cache()
    saved = read_model(path)
    if output_stride is not None:
        architecture = saved.architecture.at_output_stride(output_stride)
        info = saved.info | {"architecture": dataclasses.asdict(architecture)}
        saved = dataclasses.replace(saved, info=info)
    return Segmenter(saved, tta, large_window=DEFAULT_WINDOW if window is None else None)


class Segmenter:
    """A trained model that segments images; see `load`.

    Attributes:
      path: the checkpoint or file.
      info: its description, see `weights.saved_model.describe`.
      labels: names and colours of the classes.
      architecture: of the model, at the output stride in use.
      model: pure functions with fused batch norm, see `FunctionalModel.fused`.
      variables: its arrays, on the default device.
      mean, std: of the channels, 0..1, for normalization.
    """

    def __init__(
        self, saved: SavedModel, tta: TestTimeAugmentation, *, large_window: int | None = None
    ) -> None:
        """Puts a model on the device.

        Args:
          saved: the model.
          tta: views and windows of each image.
          large_window: side of the windows for images of more than `LARGE_IMAGE` pixels; None:
            that of `tta`.
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
        self._tta = tta
        self._large_window = large_window or tta.window
        self._predictors: dict[int | None, Predictor] = {}
        self._apply = jit_inference(_logits, self.model)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of ids."""
        return self.labels.names

    @functools.cached_property
    def palette(self) -> UInt8[np.ndarray, "256 3"]:
        """Colour of each id."""
        return self.labels.palette()

    @property
    def num_compilations(self) -> int:
        """Number of programs compiled for predictions so far."""
        return sum(predictor.num_compilations for predictor in self._predictors.values())

    def predict(self, image: ImageOrPath) -> Int32[np.ndarray, "h w"]:
        """Predicts the class id of each pixel, at the image's own size.

        Args:
          image: uint8 `[h, w, c]` of any size, RGB if the model has 3 channels; or the path of an
            image file, which is read as in training, and turned by its EXIF orientation.

        Raises:
          UserError: the file is not an image.
          ValueError: the array has another dtype or shape.
        """
        pixels = self.read(image)
        return self._predictor(pixels).ids(pixels).astype(np.int32)

    def probabilities(self, image: ImageOrPath) -> Float32[np.ndarray, "h w classes"]:
        """Predicts the probability of each class at each pixel; see `predict`."""
        pixels = self.read(image)
        return self._predictor(pixels).probabilities(pixels)

    def logits(self, images: Float[Array, "n h w c"]) -> Float32[Array, "n h w classes"]:
        """Applies the model to normalized images, without test-time augmentation.

        Args:
          images: `(pixel / 255 - mean) / std`.

        Raises:
          ValueError: a NumPy array holds NaN or infinite values; those of JAX are not checked.
        """
        if isinstance(images, np.ndarray) and not np.isfinite(images).all():
            count = np.count_nonzero(~np.isfinite(images))
            raise ValueError(f"{count} of {images.size} values of images are NaN or infinite")
        return self._apply(self.variables, jnp.asarray(images)).astype(jnp.float32)

    def read(self, image: ImageOrPath) -> UInt8[np.ndarray, "h w c"]:
        """Returns the pixels of an image and checks its channels; see `predict`."""
        channels = self.architecture.in_channels
        if isinstance(image, (str, os.PathLike)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about odd but harmless metadata
                path = required_path(image, "the path of the image")
                return read_image(path, channels, upright=True)
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
        """Returns the side of the windows for an image of this size; None: no windows."""
        return self._large_window if height * width > LARGE_IMAGE else self._tta.window

    def _predictor(self, pixels: np.ndarray) -> Predictor:
        window = self.window_of(*pixels.shape[:2])
        if window not in self._predictors:
            self._predictors[window] = Predictor(
                self.model,
                self.variables,
                mean=self.mean,
                std=self.std,
                tta=dataclasses.replace(self._tta, window=window),
            )
        return self._predictors[window]


def _logits(model: FunctionalModel, variables: Variables, images: Array) -> Array:
    return model.apply(variables, images)[0]["out"]
