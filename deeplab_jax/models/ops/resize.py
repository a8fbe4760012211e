"""Bilinear resizing of logits and features to the size of images, labels or other features."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Float, Int

from deeplab_jax.models.ops.atrous_conv import Size
from deeplab_jax.models.ops.masking import valid_sizes

MAX_SIDE = 32767  # pixels; coordinates of larger sides overflow 32 bits where sizes are traced

# The default precision of GPU and TPU would round logits to about 3 digits.
precise_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def resize_bilinear(
    x: Float[Array, "n h w c"],
    height: Size,
    width: Size,
    *,
    in_sizes: Int[Array, "n 2"] | None = None,
    out_sizes: Int[Array, "n 2"] | None = None,
) -> Float[Array, "n height width c"]:
    """Resizes bilinearly with half-pixel centres, clamped edges and no antialiasing.

    Equals torch's `interpolate(mode="bilinear", align_corners=False)`. Multiplies by a small matrix
    along each axis, so that the gradient has no scatter and is the same in each run.

    Args:
      x: map.
      height, width: size of the result, pixels.
      in_sizes: rows and columns of `x` that belong to each image; the padding outside must be
        finite. None means all.
      out_sizes: rows and columns that `in_sizes` are resized to; values outside have no meaning.
        Given together with `in_sizes`.
    """
    # Columns first, while there are few rows: the large product is then one per image.
    if in_sizes is not None and out_sizes is not None:
        rows, columns = (
            _bilinear_matrices(side, x.shape[1 + axis], out_sizes[:, axis], in_sizes[:, axis])
            for axis, side in enumerate((height, width))
        )
        widened = precise_einsum("nWw,nhwc->nhWc", columns.astype(x.dtype), x)
        return precise_einsum("nHh,nhWc->nHWc", rows.astype(x.dtype), widened)
    if x.shape[1:3] == (height, width):
        return x
    return resize_bilinear_unpadded(x, height=height, width=width)


def resize_like(
    x: Float[Array, "n h w c"], like: Float[Array, "n height width other"]
) -> Float[Array, "n height width c"]:
    """Resizes a map to the size of another map of the same images, with regard to padding."""
    height, width = like.shape[1:3]
    return resize_bilinear(x, height, width, in_sizes=valid_sizes(x), out_sizes=valid_sizes(like))


@functools.partial(jax.jit, static_argnames=("height", "width"))
def resize_bilinear_unpadded(
    x: Float[Array, "n h w c"], *, height: Size, width: Size
) -> Float[Array, "n height width c"]:
    """Resizes all of a map; jitted, so that exporters find a call by this name in a program."""
    columns = bilinear_matrix(width, x.shape[2]).astype(x.dtype)
    rows = bilinear_matrix(height, x.shape[1]).astype(x.dtype)
    widened = precise_einsum("Ww,nhwc->nhWc", columns, x)
    return precise_einsum("nHh,nhWc->nHWc", broadcast_to_batch(rows, x), widened)


def broadcast_to_batch(matrix: Any, images: Array) -> Float[Array, "n rows columns"]:
    """Repeats a matrix for each image of a batch.

    The product of a batch of matrices has the axes nHWc. With one matrix XLA computes HnWc and
    transposes the result.
    """
    return jnp.broadcast_to(matrix, (images.shape[0], *matrix.shape))


def bilinear_matrix(out_size: Size, in_size: Size) -> Any:
    """Returns float64 `[out_size, in_size]`, the weight of each input for each output.

    With a symbolic size the matrix is a traced float32 array.
    """
    if export.is_symbolic_dim(out_size) or export.is_symbolic_dim(in_size):
        sizes = (jnp.asarray([size], jnp.int32) for size in (out_size, in_size))
        return _bilinear_matrices(out_size, in_size, *sizes)[0]
    coordinates = np.clip(source_coordinates(out_size, in_size), 0, in_size - 1)
    return np.maximum(0, 1 - np.abs(coordinates[:, None] - np.arange(in_size)[None, :]))


def source_coordinates(out_size: int, in_size: int) -> Float[np.ndarray, " out_size"]:
    """Returns the coordinate of each output pixel's centre in the input, in input pixels."""
    return (np.arange(out_size) + 0.5) * in_size / out_size - 0.5


def _bilinear_matrices(
    out_side: Size, in_side: Size, out_sizes: Int[Array, " n"], in_sizes: Int[Array, " n"]
) -> Float[Array, "n out_side in_side"]:
    """Returns the `bilinear_matrix` of each image's sizes, padded to `[out_side, in_side]`.

    Computes coordinates as fractions of integers: in float32 those of large images would be off by
    1e-4 pixels.

    Raises:
      ValueError: numerators would not fit in 32 bits. Symbolic sides are not checked.
    """
    is_symbolic = export.is_symbolic_dim(out_side) or export.is_symbolic_dim(in_side)
    if not is_symbolic and (2 * out_side + 1) * in_side >= 2**31:
        raise ValueError(f"cannot resize a side of {in_side} to {out_side} pixels: too large")
    denominator = 2 * out_sizes[:, None]
    numerator = (2 * jnp.arange(out_side) + 1) * in_sizes[:, None] - out_sizes[:, None]
    numerator = jnp.clip(numerator, 0, denominator * (in_sizes[:, None] - 1))
    lower = (numerator // denominator)[..., None]
    fraction = (numerator % denominator / denominator)[..., None]
    index = jnp.arange(in_side)
    return jnp.where(index == lower, 1 - fraction, 0) + jnp.where(index == lower + 1, fraction, 0)
