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

from deeplab_jax.config import Config, resolve_eval
from deeplab_jax.config import io as config_io
from deeplab_jax.data.io.images import read_image
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.inference import calibration as calibration_lib
from deeplab_jax.inference.calibration import Calibration
from deeplab_jax.inference.compilation import jit_inference, use_compilation_cache
from deeplab_jax.inference.positive import PositiveClass
from deeplab_jax.inference.predictor import Predictor, TestTimeAugmentation
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.paths import CALIBRATION, is_bucket, required_path
from deeplab_jax.utils.progress import in_thread
from deeplab_jax.weights import hub
from deeplab_jax.weights.convert import read_model
from deeplab_jax.weights.saved_model import SavedModel

ImageOrPath = UInt8[np.ndarray, "h w c"] | str | os.PathLike[str]


def load(
    path: str | os.PathLike[str],
    *,
    output_stride: int | None = None,
    scales: Sequence[float] | None = None,
    flip: bool | None = None,
    window: int | None = None,
    overlap: float | None = None,
    calibration: str | os.PathLike[str] | None = None,
    wait: bool = True,
) -> Segmenter:
    """Loads a trained model, to predict as its run was evaluated.

    An argument that is None is that of the section `eval` of the run's config.json. Without a run,
    as of a weights file or a checkpoint outside its workdir, it is the default of that section.

    Args:
      path: a workdir of training, whose best checkpoint is loaded; a checkpoint's folder; a weights
        file or folder of another codebase (docs/weights.md); one of these in a bucket, as
        `gs://bucket/run`; the name of published weights; or `hf://org/name`.
      output_stride: 8 to 32 (256 with a cascade). Default: that of training.
      scales: of the image; probabilities are averaged over them. Default: 1.
      flip: average over the mirror image too. Default: False.
      window: side, pixels, of the windows that larger images are cut into; 0: never cut an image.
        Default: 1025 for images of more than 4 million pixels, 0 for others.
      overlap: smallest fraction of a window that the next one covers too. Default: 0.5.
      calibration: file that `deeplab-jax calibrate` wrote. Default: `calibration.json` in the
        checkpoint's folder, if it is there.
      wait: whether to wait for the arrays. If not, they are read in a thread, so that programs can
        be compiled meanwhile, and `Segmenter.variables` raises what reading them raised.

    Returns:
      The model with its classes and colours.

    Raises:
      UserError: there is no model at the path, or an argument is invalid.

    Example:
      >>> segmenter = deeplab_jax.load("runs/voc")  # doctest: +SKIP
      >>> ids = segmenter.predict("photo.jpg")  # int32 [h, w]  # doctest: +SKIP
    """
    if is_bucket(path):
        path = hub.find_weights(path)
    run = config_io.from_run(required_path(path, "the path of the weights")) or Config()
    settings = resolve_eval(run)
    if settings.protocol != "native":  # whole images, to which windows were no choice
        settings.window = settings.window or None
    if output_stride is None:
        output_stride = settings.output_stride
    tta = TestTimeAugmentation(  # checks the arguments before the model is read
        tuple(settings.scales if scales is None else scales),
        settings.flip if flip is None else flip,
        settings.window if window is None else window,
        settings.overlap if overlap is None else overlap,
    )
    use_compilation_cache()
    saved = read_model(path)
    if output_stride is not None:
        architecture = saved.architecture.at_output_stride(output_stride)
        info = saved.info | {"architecture": dataclasses.asdict(architecture)}
        saved = dataclasses.replace(saved, info=info)
    if calibration is not None and not is_bucket(calibration):
        calibration = required_path(calibration, "the path of the calibration")
    segmenter = Segmenter(saved, tta, calibration)
    if wait:
        _ = segmenter.variables
    return segmenter


class Segmenter:
    """A trained model that segments images; see `load`.

    Attributes:
      path: the checkpoint or file.
      info: its description, see `weights.saved_model.describe`.
      labels: names and colours of the classes.
      architecture: of the model, at the output stride in use.
      model: pure functions with fused batch norm, see `FunctionalModel.fused`.
      mean, std: of the channels, 0..1, for normalization.
      tta: views and windows of each image.
      predictor: its programs.
    """

    def __init__(
        self,
        saved: SavedModel,
        tta: TestTimeAugmentation,
        calibration: str | os.PathLike[str] | None = None,
    ) -> None:
        """Reads the arrays in a thread, and puts them on the default device."""
        self.path: pathlib.Path = saved.path
        self.info: dict[str, Any] = saved.info
        self.labels = LabelSet(
            tuple(saved.info["classes"]), tuple(map(tuple, saved.info["palette"]))
        )
        self.architecture: Architecture = saved.architecture
        original = FunctionalModel.of(self.architecture)
        device = jax.device_put(np.float32(0)).device  # that of this thread's context

        def variables() -> Variables:
            with jax.default_device(device):
                return jax.device_put(original.fuse(saved.variables))

        self._variables = in_thread(variables, name="read")
        self.model = original.fused
        self.mean: tuple[float, ...] = tuple(saved.info["mean"])
        self.std: tuple[float, ...] = tuple(saved.info["std"])
        self.tta = tta
        self._calibration = calibration
        if calibration is not None:
            _ = self.calibration  # raises now if the file is not valid
        self.predictor = Predictor(
            self.model, self._variables.result, mean=self.mean, std=self.std, tta=tta
        )
        self._apply = jit_inference(_logits, self.model)

    @property
    def variables(self) -> Variables:
        """Arrays of the model, on the default device; raises UserError if they are not valid."""
        return self._variables.result()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of ids."""
        return self.labels.names

    @functools.cached_property
    def palette(self) -> UInt8[np.ndarray, "256 3"]:
        """Colour of each id."""
        return self.labels.palette()

    @functools.cached_property
    def calibration(self) -> Calibration | None:
        """Temperatures and the rule for unsure pixels; None if there are none.

        The file beside the checkpoint is read where it is used, so that a damaged one does not keep
        the model from predicting, or from being calibrated anew. Raises UserError if it is damaged.
        """
        beside = self.path / CALIBRATION
        file = self._calibration or (beside if beside.is_file() else None)
        return calibration_lib.read(file, self.classes) if file else None

    @property
    def num_compilations(self) -> int:
        """Number of programs compiled for predictions so far."""
        return self.predictor.num_compilations

    def predict(
        self, image: ImageOrPath, positive: PositiveClass | None = None
    ) -> Int32[np.ndarray, "h w"]:
        """Predicts the class id of each pixel, at the image's own size.

        Args:
          image: uint8 `[h, w, c]` of any size, RGB if the model has 3 channels; or the path of an
            image file, which is read as in training, and turned by its EXIF orientation.
          positive: class that a threshold predicts, if any.

        Raises:
          UserError: the file is not an image, or the array has another dtype or shape.
        """
        return self.predictor.ids_and_scores(self.read(image), positive)[0].astype(np.int32)

    def probabilities(self, image: ImageOrPath) -> Float32[np.ndarray, "h w classes"]:
        """Predicts the probability of each class at each pixel; see `predict`."""
        return self.predictor.probabilities(self.read(image))

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
        """Returns the pixels of an image; see `predict`."""
        if not isinstance(image, (str, os.PathLike)):
            return np.asarray(image)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd but harmless metadata
            if is_bucket(image):
                from deeplab_jax.buckets import staging

                image = staging.stage(str(image), title="an image to segment")
            path = required_path(image, "the path of the image")
            return read_image(path, self.architecture.in_channels, upright=True)


def _logits(model: FunctionalModel, variables: Variables, images: Array) -> Array:
    return model.apply(variables, images)[0]["out"]
