"""The program to export: a function of uint8 images, with the model's arrays."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, UInt8

from deeplab_jax.models.functional import FunctionalModel, Variables, normalize
from deeplab_jax.models.ops.convolution import Implementation
from deeplab_jax.models.ops.resize import MAX_SIDE
from deeplab_jax.weights.saved_model import SavedModel


class Dimensions(NamedTuple):
    """Sizes of the images that the exported program takes; None means any."""

    batch: int | None = None
    height: int | None = None
    width: int | None = None


@jax.jit
def softmax(logits: Float[Array, "n h w classes"]) -> Float[Array, "n h w classes"]:
    """Returns class probabilities; jitted, so that exporters find a call by this name."""
    return jax.nn.softmax(logits, axis=-1)


def class_ids(logits: Float[Array, "n h w classes"]) -> UInt8[Array, "n h w"]:
    """Returns the class of the highest logit, or the first of equal ones."""
    return jnp.argmax(logits, axis=-1).astype(jnp.uint8)


# The outputs of a program, as functions of logits.
OUTPUTS: dict[str, Callable[[Array], Array]] = {
    "ids": class_ids,
    "probabilities": softmax,
    "logits": lambda logits: logits,
}


class Program:
    """A model with its pre- and post-processing, in float32 regardless of its training dtype."""

    def __init__(self, saved: SavedModel, output: str, dimensions: Dimensions) -> None:
        self.saved = saved
        self.original = FunctionalModel(dataclasses.replace(saved.architecture, dtype="float32"))
        self.model = self.original.fused  # with batch norms fused into the convolutions
        self.variables: Variables = self.original.fuse(saved.variables)  # of `model`
        self.output = output
        self.dimensions = dimensions

    def __call__(
        self, variables: Variables, images: UInt8[Array, "n h w c"]
    ) -> Float[Array, "n h w classes"] | UInt8[Array, "n h w"]:
        return OUTPUTS[self.output](self._logits(self.model, variables, images))

    def using(self, implementation: Implementation) -> Program:
        """Returns the program with another implementation of its operations."""
        program = copy.copy(self)
        program.model = self.model.using(implementation)
        return program

    def reference(
        self, variables: Variables, images: UInt8[Array, "n h w c"]
    ) -> Float[Array, "n h w classes"]:
        """Returns the logits of the saved model, from its own variables."""
        return self._logits(self.original, variables, images)

    def _logits(self, model: FunctionalModel, variables: Variables, images: Array) -> Array:
        info = self.saved.info
        pixels = normalize(images, tuple(info["mean"]), tuple(info["std"]))
        return model.apply(variables, pixels)[0]["out"]

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the images, with symbolic sizes `batch`, `height` and `width`."""
        dimensions = self.dimensions._asdict()
        channels = self.model.architecture.in_channels
        spec = ", ".join(str(size or name) for name, size in dimensions.items())
        limits = [f"{name} <= {MAX_SIDE}" for name in ("height", "width") if not dimensions[name]]
        shape: Any = export.symbolic_shape(f"{spec}, {channels}", constraints=limits)
        return jax.ShapeDtypeStruct(shape, jnp.uint8)

    @property
    def description(self) -> dict[str, Any]:
        """Facts about the model that a user of the file needs, for JSON."""
        architecture = self.model.architecture
        names = ("classes", "palette", "mean", "std")
        stride = architecture.output_stride
        return {
            "architecture": architecture.name,
            "output_stride": stride,
            # Best sides of images are a multiple of it plus 1, see `inference.views`.
            "side_multiple": stride if architecture.padding == "same" else 1,
            "output": self.output,
            **{name: self.saved.info[name] for name in names},
        }
