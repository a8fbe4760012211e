"""What is exported: a function of uint8 images, with the model's arrays and all around it."""

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
    """Sizes that the exported program takes; None: any."""

    batch: int | None = None
    height: int | None = None
    width: int | None = None


@jax.jit
def softmax(logits: Float[Array, "n h w classes"]) -> Float[Array, "n h w classes"]:
    """Probabilities of each pixel's classes; a call of this name in a program, for exporters."""
    return jax.nn.softmax(logits, axis=-1)


def class_ids(logits: Float[Array, "n h w classes"]) -> UInt8[Array, "n h w"]:
    """The class of the highest logit, the first of equal ones."""
    return jnp.argmax(logits, axis=-1).astype(jnp.uint8)


# What the program gives, of logits at the images' size.
OUTPUTS: dict[str, Callable[[Array], Array]] = {
    "ids": class_ids,
    "probabilities": softmax,
    "logits": lambda logits: logits,
}


class Program:
    """A model from pixels to an output, in float32 whatever type it was trained in.

    Attributes:
      saved: the model, as it is described.
      original: its functions as it was trained.
      model: those with fused batch norm, see `FunctionalModel.fused`.
      variables: the arrays of `model`.
      output: a name in `OUTPUTS`.
      dimensions: sizes that it takes.
    """

    def __init__(self, saved: SavedModel, output: str, dimensions: Dimensions) -> None:
        self.saved = saved
        self.original = FunctionalModel(dataclasses.replace(saved.architecture, dtype="float32"))
        self.model = self.original.fused
        self.variables: Variables = self.original.fuse(saved.variables)
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
        """The logits by the saved model's own variables, without fused batch norms."""
        return self._logits(self.original, variables, images)

    def _logits(self, model: FunctionalModel, variables: Variables, images: Array) -> Array:
        info = self.saved.info
        pixels = normalize(images, tuple(info["mean"]), tuple(info["std"]))
        return model.apply(variables, pixels)[0]["out"]

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """Of the argument: sizes that are left open are `batch`, `height` and `width`."""
        dimensions = self.dimensions._asdict()
        channels = self.model.architecture.in_channels
        spec = ", ".join(str(size or name) for name, size in dimensions.items())
        limits = [f"{name} <= {MAX_SIDE}" for name in ("height", "width") if not dimensions[name]]
        shape: Any = export.symbolic_shape(f"{spec}, {channels}", constraints=limits)
        return jax.ShapeDtypeStruct(shape, jnp.uint8)

    @property
    def description(self) -> dict[str, Any]:
        """What a user of the file needs to know of the model, for JSON."""
        info = self.saved.info
        return {
            "architecture": self.model.architecture.name,
            "output_stride": self.model.architecture.output_stride,
            "output": self.output,
            "classes": info["classes"],
            "palette": info["palette"],
            "mean": info["mean"],
            "std": info["std"],
        }
