"""Comparison of an exported program with the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from deeplab_jax.export.program import Program

# Sizes to compare where a dimension is symbolic: odd and even, wide and tall, one image and more.
SYMBOLIC_SHAPES = ((1, 65, 97), (2, 96, 65), (1, 129, 161))  # images, height, width


class Comparison(NamedTuple):
    """The difference between the results of the model and the exported program for one batch."""

    shape: tuple[int, int, int]  # number of images, height, width
    images: str  # what they show: "noise" or "smooth"
    # The largest, relative to the largest magnitude of the model's logits (for probabilities, to 1
    # if that is larger). For ids, by how much the model's logit of another class is higher at most.
    difference: float
    agreement: float  # fraction of pixels with the same class


def compare(program: Program, exported: Callable[[np.ndarray], np.ndarray]) -> list[Comparison]:
    """Runs the model and an exported program on noise and smooth images, uint8 `[n, h, w, c]`.

    Where dimensions are symbolic, several shapes are compared.
    """
    reference = jax.jit(program.reference)
    variables = jax.device_put(program.saved.variables)
    comparisons = []
    for name, images in pictures(program):
        logits = np.asarray(reference(variables, images))
        number, height, width, _ = images.shape
        values = difference(program.output, logits, exported(images))
        comparisons.append(Comparison((number, height, width), name, *values))
    return comparisons


def difference(
    output: str, logits: Float[np.ndarray, "n h w classes"], result: np.ndarray
) -> tuple[float, float]:
    """Returns `Comparison.difference` and `.agreement` of a result and the model's logits.

    Raises:
      ValueError: the result does not have the shape and dtype of this kind of output.
    """
    ids, largest = logits.argmax(axis=-1), np.abs(logits).max()
    shape, dtype = (ids.shape, "uint8") if output == "ids" else (logits.shape, "float32")
    if (result.shape, result.dtype) != (shape, dtype):
        raise ValueError(
            f"{output} must be {dtype} {list(shape)}, got {result.dtype} {list(result.shape)}"
        )
    if output == "ids":
        chosen = np.take_along_axis(logits, result[..., None].astype(np.intp), axis=-1)
        error, found = logits.max(axis=-1, keepdims=True) - chosen, result
    else:
        expected, found = logits, result.argmax(axis=-1)
        if output == "probabilities":
            exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
            expected = exponentials / exponentials.sum(axis=-1, keepdims=True)
            largest = max(largest, 1.0)
        error = result - expected
    return float(np.abs(error).max() / largest), float(np.mean(ids == found))


def pictures(program: Program) -> Iterator[tuple[str, UInt8[np.ndarray, "n h w c"]]]:
    """Yields "noise" or "smooth", and images that show it.

    Their shapes are `SYMBOLIC_SHAPES` with the program's fixed dimensions, without duplicates.
    """
    batch, height, width = program.dimensions
    channels = program.model.architecture.in_channels
    for n, h, w in dict.fromkeys(
        (batch or n, height or h, width or w) for n, h, w in SYMBOLIC_SHAPES
    ):
        rng = np.random.default_rng(0)
        yield "noise", rng.integers(0, 256, (n, h, w, channels), dtype=np.uint8)
        rows, columns = np.linspace(0, 2 * np.pi, h), np.linspace(0, 2 * np.pi, w)
        frequency = rng.integers(1, 4, (2, n, 1, 1, channels))
        phase = rng.uniform(0, 6, (n, 1, 1, channels))
        waves = frequency[0] * rows[:, None, None] + frequency[1] * columns[:, None] + phase
        yield "smooth", np.rint(127.5 + 127.5 * np.sin(waves)).astype(np.uint8)
