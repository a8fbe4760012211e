"""Whether an exported program gives what the model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from deeplab_jax.export.program import Dimensions, Program

# Of what is tried where a size is left open: odd and even, wide and tall, more than one image.
OPEN_SHAPES = ((1, 65, 97), (2, 96, 65), (1, 129, 161))  # images, height, width


class Comparison(NamedTuple):
    """A batch's result, by the model and by the exported program.

    Attributes:
      shape: images, height, width.
      images: what they show.
      difference: the largest, relative to the largest magnitude of the model's logits (for
        probabilities: at least to 1). For ids: by how much the model prefers another class.
      agreement: share of pixels of the same class.
    """

    shape: tuple[int, int, int]
    images: str
    difference: float
    agreement: float


def compare(program: Program, exported: Callable[[np.ndarray], np.ndarray]) -> list[Comparison]:
    """Runs both on noise and on smooth images of several shapes, as far as these are left open.

    Args:
      program: the model.
      exported: function of uint8 `[n, h, w, c]`, whose output is the program's.
    """
    reference = jax.jit(program.reference)
    variables = jax.device_put(program.saved.variables)
    channels = program.model.architecture.in_channels
    comparisons = []
    for shape in _shapes(program.dimensions):
        for name, images in _images(*shape, channels):
            logits = np.asarray(reference(variables, images))
            result = exported(images)
            comparisons.append(Comparison(shape, name, *difference(program.output, logits, result)))
    return comparisons


def difference(
    output: str, logits: Float[np.ndarray, "n h w classes"], result: np.ndarray
) -> tuple[float, float]:
    """`Comparison.difference` and `.agreement` of a result with the model's logits.

    Args:
      output: what the result is, a name in `program.OUTPUTS`.
      logits: the model's.
      result: the exported program's.

    Raises:
      ValueError: the result has not the shape and type of this output.
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
        given = np.take_along_axis(logits, result[..., None].astype(np.intp), axis=-1)[..., 0]
        return float((logits.max(axis=-1) - given).max() / largest), float(np.mean(ids == result))
    if output == "probabilities":
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        error = result - exponentials / exponentials.sum(axis=-1, keepdims=True)
        largest = max(largest, 1.0)
    else:
        error = result - logits
    return float(np.abs(error).max() / largest), float(np.mean(ids == result.argmax(axis=-1)))


def _shapes(dimensions: Dimensions) -> list[tuple[int, int, int]]:
    shapes = dict.fromkeys(
        (
            dimensions.batch or images,
            dimensions.height or height,
            dimensions.width or width,
        )
        for images, height, width in OPEN_SHAPES
    )
    return list(shapes)


def _images(
    count: int, height: int, width: int, channels: int
) -> Iterator[tuple[str, UInt8[np.ndarray, "n h w c"]]]:
    rng = np.random.default_rng(0)
    yield "noise", rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    rows, columns = np.linspace(0, 2 * np.pi, height), np.linspace(0, 2 * np.pi, width)
    frequency, phase = (
        rng.integers(1, 4, (2, count, channels)),
        rng.uniform(0, 6, (count, channels)),
    )
    waves = (
        frequency[0, :, None, None] * rows[:, None, None]
        + frequency[1, :, None, None] * columns[:, None]
        + phase[:, None, None]
    )
    yield "smooth", np.rint(127.5 + 127.5 * np.sin(waves)).astype(np.uint8)
