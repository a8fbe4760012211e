"""Comparison of an exported program with the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from deeplab_jax.export.program import Dimensions, Program

# Sizes to compare where a dimension is symbolic: odd and even, wide and tall, one image and more.
SYMBOLIC_SHAPES = ((1, 65, 97), (2, 96, 65), (1, 129, 161))  # images, height, width


class Comparison(NamedTuple):
    """The difference between the results of the model and the exported program for one batch.

    Attributes:
      shape: number of images, height, width.
      images: what the images show: "noise" or "smooth".
      difference: largest difference, relative to the largest magnitude of the model's logits (for
        probabilities, to 1 if that is larger). For ids, the largest amount by which the model's
        logit of another class is higher.
      agreement: fraction of pixels with the same class.
    """

    shape: tuple[int, int, int]
    images: str
    difference: float
    agreement: float


def compare(program: Program, exported: Callable[[np.ndarray], np.ndarray]) -> list[Comparison]:
    """Runs the model and an exported program on noise and smooth images.

    Args:
      program: the model.
      exported: the exported program, as a function of uint8 `[n, h, w, c]`. Where its dimensions
        are symbolic, several shapes are compared.
    """
    reference = jax.jit(program.reference)
    variables = jax.device_put(program.saved.variables)
    channels = program.model.architecture.in_channels
    comparisons = []
    for shape, name, images in pictures(program.dimensions, channels):
        logits = np.asarray(reference(variables, images))
        result = exported(images)
        comparisons.append(Comparison(shape, name, *difference(program.output, logits, result)))
    return comparisons


def difference(
    output: str, logits: Float[np.ndarray, "n h w classes"], result: np.ndarray
) -> tuple[float, float]:
    """Returns `Comparison.difference` and `.agreement` of a result and the model's logits.

    Args:
      output: kind of the result, a name in `program.OUTPUTS`.
      logits: logits of the model.
      result: output of the exported program.

    Raises:
      ValueError: the result does not have the shape and dtype of this kind of output.
    """
    ids = logits.argmax(axis=-1)
    expected: tuple[tuple[int, ...], type] = (logits.shape, np.float32)
    if output == "ids":
        expected = (ids.shape, np.uint8)
    if (result.shape, result.dtype) != expected:
        raise ValueError(
            f"{output} must be {expected[1].__name__} {list(expected[0])}, got {result.dtype} "
            f"{list(result.shape)}"
        )
    largest = np.abs(logits).max()
    if output == "ids":
        chosen = np.take_along_axis(logits, result[..., None].astype(np.intp), axis=-1)[..., 0]
        return float((logits.max(axis=-1) - chosen).max() / largest), float(np.mean(ids == result))
    if output == "probabilities":
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        error = result - exponentials / exponentials.sum(axis=-1, keepdims=True)
        largest = max(largest, 1.0)
    else:
        error = result - logits
    return float(np.abs(error).max() / largest), float(np.mean(ids == result.argmax(axis=-1)))


def pictures(
    dimensions: Dimensions, channels: int
) -> Iterator[tuple[tuple[int, int, int], str, UInt8[np.ndarray, "n h w c"]]]:
    """Yields a shape, "noise" or "smooth", and images that show it.

    The shapes are `SYMBOLIC_SHAPES` with the fixed dimensions replaced, without duplicates.
    """
    batch, height, width = dimensions
    for shape in dict.fromkeys(
        (batch or n, height or h, width or w) for n, h, w in SYMBOLIC_SHAPES
    ):
        for name, images in _images(*shape, channels):
            yield shape, name, images


def _images(
    count: int, height: int, width: int, channels: int
) -> Iterator[tuple[str, UInt8[np.ndarray, "n h w c"]]]:
    rng = np.random.default_rng(0)
    yield "noise", rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    rows, columns = np.linspace(0, 2 * np.pi, height), np.linspace(0, 2 * np.pi, width)
    frequency = rng.integers(1, 4, (2, count, channels))
    phase = rng.uniform(0, 6, (count, channels))
    waves = (
        frequency[0, :, None, None] * rows[:, None, None]
        + frequency[1, :, None, None] * columns[:, None]
        + phase[:, None, None]
    )
    yield "smooth", np.rint(127.5 + 127.5 * np.sin(waves)).astype(np.uint8)
