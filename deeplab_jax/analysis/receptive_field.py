"""The effective receptive field: what the logits depend on (Luo et al. 2016, arXiv 1701.04128)."""

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

ENERGY_FRACTION = 0.95  # of the energy that lies in the square called the effective field


@dataclasses.dataclass(frozen=True)
class EffectiveField:
    """How much the logits at the centre depend on each pixel."""

    # Absolute gradient of the logits, summed over channels and averaged over random images; scaled
    # so that its sum is 1.
    energy: Float[np.ndarray, "h w"]
    centre: tuple[int, int]  # row and column of the pixel at the position of the logits
    theoretical: int  # `Convolution.field_of_view` of the logits
    sees_image: bool = False

    def side(self, fraction: float = ENERGY_FRACTION) -> int:
        """Side of the smallest centred square with this fraction of the energy, pixels."""
        rows, columns = (
            np.abs(np.arange(size) - centre)
            for size, centre in zip(self.energy.shape, self.centre, strict=True)
        )
        distance = np.maximum(rows[:, None], columns)
        within = np.cumsum(np.bincount(distance.ravel(), self.energy.ravel()))
        # Rounding may leave the sum of all below a fraction of 1.
        return 2 * min(int(np.searchsorted(within, fraction)), len(within) - 1) + 1


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
    """Computes the gradient of the logits at the centre of the map with respect to the image.

    In float32, with running statistics; the logits are those before the resize to the image. The
    pixels of the `samples` images are independent and normal; `progress` is called after each.

    Raises:
      UserError: the gradient is 0 everywhere, or not finite.
      ValueError: `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    architecture = dataclasses.replace(architecture, dtype="float32")
    if architecture.decoder == "transposed":  # its logits have the image's size from the start
        architecture = dataclasses.replace(architecture, decoder="bilinear")
    model = FunctionalModel(architecture)
    last = next(c for c in convolutions(model, height, width) if c.name == "classifier.logits")
    assert last.output_stride is not None
    assert last.field_of_view is not None
    middle = last.out_shape[0] // 2, last.out_shape[1] // 2

    def logits_at_centre(image: Any, variables: Variables) -> Any:
        outputs, _ = model.apply(variables, image, upsample=False)
        return outputs["out"][0, middle[0], middle[1]].sum()

    variables = Variables(  # without those of the learned decoder
        {name: variables.params[name] for name in model.abstract.params},
        {name: variables.batch_stats[name] for name in model.abstract.batch_stats},
    )
    gradient = jax.jit(jax.grad(logits_at_centre))
    energy = np.zeros((height, width))
    for key in jax.random.split(jax.random.key(seed), samples):
        image = jax.random.normal(key, (1, height, width, architecture.in_channels), jnp.float32)
        energy += np.abs(np.asarray(gradient(image, variables), np.float64)[0]).sum(-1)
        progress()
    total = energy.sum()
    if not 0 < total < np.inf:
        raise UserError(
            f"{architecture.name}: the gradient of the logits at the centre sums to {total}, "
            "expected a positive number: the weights seem to be damaged"
        )
    centre = tuple(
        min(position * last.output_stride, size - 1)
        for position, size in zip(middle, (height, width), strict=True)
    )
    return EffectiveField(
        energy / total, (centre[0], centre[1]), last.field_of_view, last.sees_image
    )


def variants(architecture: Architecture) -> list[tuple[str, Architecture]]:
    """Names variants of a model to compare: each output stride, and ASPP with all rates 1.

    All have the same parameters. Output strides at which an atrous rate would not be an integer are
    left out.
    """
    found = []
    for output_stride in output_strides(architecture.cascade):
        with contextlib.suppress(UserError):
            found.append(architecture.at_output_stride(output_stride))
    rates = architecture.atrous_rates
    if rates:
        found.append(dataclasses.replace(architecture, atrous_rates=(1,) * len(rates)))
    named = []
    for variant in found:
        name = f"output stride {variant.output_stride}"
        if rates:
            name += f", ASPP rates {', '.join(map(str, variant.atrous_rates))}"
        named.append((name, variant))
    return named
