"""The effective receptive field: what a model looks at (Luo et al. 2016, arXiv 1701.04128)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from deeplab_jax.analysis.conv_trace import convolutions
from deeplab_jax.config import output_strides
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.functional import FunctionalModel, Variables
from deeplab_jax.utils.errors import UserError

SHARE = 0.95  # of the energy, that an effective field is the least square around


@dataclasses.dataclass(frozen=True)
class EffectiveField:
    """How much the logits at the centre depend on each pixel.

    Attributes:
      energy: mean over random images of the gradient's absolute value, summed over channels; its
        sum is 1.
      centre: row and column of the pixel on which the logits' position lies.
      theoretical: side of the square that the logits see through convolutions, pixels, the
        image's borders apart; image pooling sees all besides.
    """

    energy: Float[np.ndarray, "h w"]
    centre: tuple[int, int]
    theoretical: int

    def side(self, share: float = SHARE) -> int:
        """Side of the least square around the centre that holds a share of the energy, pixels."""
        rows, columns = (
            np.abs(np.arange(size) - centre)
            for size, centre in zip(self.energy.shape, self.centre, strict=True)
        )
        distance = np.maximum(rows[:, None], columns)
        held = np.cumsum(np.bincount(distance.ravel(), self.energy.ravel()))
        # Rounding may leave the sum of all below a share of 1.
        return 2 * min(int(np.searchsorted(held, share)), len(held) - 1) + 1


def effective_field(
    architecture: Architecture,
    variables: Variables,
    height: int,
    width: int,
    *,
    samples: int = 4,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> EffectiveField:
    """Differentiates the sum of the logits at the centre of the map by the image.

    Batch norm is by running statistics, and the logits are taken before they are resized.

    Args:
      architecture: of the model, computed in float32.
      variables: its arrays.
      height, width: of the images, pixels.
      samples: number of images, of independent normal values.
      seed: of the images.
      progress: called after each image.

    Raises:
      UserError: the logits depend on no pixel, or their gradient is no number.
      ValueError: there is no sample.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    architecture = dataclasses.replace(architecture, dtype="float32")
    if architecture.decoder == "transposed":  # it has no logits before they are upsampled
        architecture = dataclasses.replace(architecture, decoder="bilinear")
    model = FunctionalModel(architecture)
    last = next(c for c in convolutions(model, height, width) if c.name == "classifier.logits")
    assert last.output_stride is not None
    assert last.field_of_view is not None
    middle = last.out_shape[0] // 2, last.out_shape[1] // 2

    def logits_at_centre(image: Any, variables: Variables) -> Any:
        outputs, _ = model.apply(variables, image, upsample=False)
        return outputs["out"][0, middle[0], middle[1]].sum()

    variables = _known(variables, model)
    gradient = jax.jit(jax.grad(logits_at_centre))
    energy = np.zeros((height, width))
    for key in jax.random.split(jax.random.key(seed), samples):
        image = jax.random.normal(key, (1, height, width, architecture.in_channels), jnp.float32)
        energy += np.abs(np.asarray(gradient(image, variables), np.float64)[0]).sum(-1)
        progress()
    total = energy.sum()
    if not 0 < total < np.inf:
        raise UserError(
            f"{architecture.name}: the gradient of the logits at the centre by the image sums to "
            f"{total}: are its weights whole?"
        )
    centre = tuple(
        min(place * last.output_stride, size - 1)
        for place, size in zip(middle, (height, width), strict=True)
    )
    return EffectiveField(energy / total, (centre[0], centre[1]), last.field_of_view)


def _known(variables: Variables, model: FunctionalModel) -> Variables:
    """The arrays that a model has, without those of a learned decoder that it is made without."""
    ours, theirs = model.abstract, variables
    return Variables(
        {name: theirs.params[name] for name in ours.params},
        {name: theirs.batch_stats[name] for name in ours.batch_stats},
    )


def variants(architecture: Architecture) -> list[tuple[str, Architecture]]:
    """A model at each output stride, and without the rates of ASPP: the same parameters for all.

    Returns:
      (name, architecture); without the output strides at which a rate would not be whole.
    """
    found = []
    for output_stride in output_strides(architecture.cascade):
        with contextlib.suppress(UserError):
            found.append(architecture.at_output_stride(output_stride))
    if architecture.cascade is None:
        ones = (1,) * len(architecture.atrous_rates)
        found.append(dataclasses.replace(architecture, atrous_rates=ones))
    return [(_variant_name(variant), variant) for variant in found]


def _variant_name(architecture: Architecture) -> str:
    name = f"output stride {architecture.output_stride}"
    if architecture.cascade is not None:
        return name
    return f"{name}, ASPP rates {', '.join(map(str, architecture.atrous_rates))}"
