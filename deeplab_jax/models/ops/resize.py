"""Bilinear resizing of logits and features to the size of images, labels or other features.

By default pixels have half-pixel centres: the borders of both maps coincide. With `align_corners`
the centres of their corner pixels do, as in TensorFlow's DeepLab. Both are torch's `interpolate`
with that argument, without antialiasing.
"""

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
    align_corners: bool = False,
) -> Float[Array, "n height width c"]:
    """Resizes bilinearly with clamped edges and no antialiasing.

    Multiplies by a small matrix along each axis, so that the gradient has no scatter and is the
    same in each run.

    Args:
      x: map.
      height, width: size of the result, pixels.
      in_sizes: rows and columns of `x` that belong to each image; the padding outside must be
        finite. None means all.
      out_sizes: rows and columns that `in_sizes` are resized to; values outside have no meaning.
        Given together with `in_sizes`.
      align_corners: whether corner pixels of both maps have the same centres.
    """
    # Columns first, while there are few rows: the large product is then one per image.
    if in_sizes is not None and out_sizes is not None:
        rows, columns = (
            _bilinear_matrices(
                side, x.shape[1 + axis], out_sizes[:, axis], in_sizes[:, axis], align_corners
            )
            for axis, side in enumerate((height, width))
        )
        widened = precise_einsum("nWw,nhwc->nhWc", columns.astype(x.dtype), x)
        return precise_einsum("nHh,nhWc->nHWc", rows.astype(x.dtype), widened)
    if x.shape[1:3] == (height, width):
        return x
    resize = resize_aligned_unpadded if align_corners else resize_bilinear_unpadded
    return resize(x, height=height, width=width)


def resize_like(
    x: Float[Array, "n h w c"],
    like: Float[Array, "n height width other"],
    *,
    align_corners: bool = False,
) -> Float[Array, "n height width c"]:
    """Resizes a map to the size of another map of the same images, with regard to padding."""
    sizes: dict[str, Any] = {"in_sizes": valid_sizes(x), "out_sizes": valid_sizes(like)}
    return resize_bilinear(x, *like.shape[1:3], **sizes, align_corners=align_corners)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def resize_bilinear_unpadded(
    x: Float[Array, "n h w c"], *, height: Size, width: Size
) -> Float[Array, "n height width c"]:
    """Resizes all of a map; jitted, so that exporters find a call by this name in a program."""
    return _resize(x, height, width, align_corners=False)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def resize_aligned_unpadded(
    x: Float[Array, "n h w c"], *, height: Size, width: Size
) -> Float[Array, "n height width c"]:
    """Resizes all of a map with aligned corners; jitted as `resize_bilinear_unpadded` is."""
    return _resize(x, height, width, align_corners=True)


def _resize(x: Array, height: Size, width: Size, *, align_corners: bool) -> Array:
    columns = bilinear_matrix(width, x.shape[2], align_corners).astype(x.dtype)
    rows = bilinear_matrix(height, x.shape[1], align_corners).astype(x.dtype)
    widened = precise_einsum("Ww,nhwc->nhWc", columns, x)
    return precise_einsum("nHh,nhWc->nHWc", broadcast_to_batch(rows, x), widened)


def broadcast_to_batch(matrix: Any, images: Array) -> Float[Array, "n rows columns"]:
    """Repeats a matrix for each image of a batch.

    The product of a batch of matrices has the axes nHWc. With one matrix XLA computes HnWc and
    transposes the result.
    """
    return jnp.broadcast_to(matrix, (images.shape[0], *matrix.shape))


def bilinear_matrix(out_size: Size, in_size: Size, align_corners: bool = False) -> Any:
    """Returns float64 `[out_size, in_size]`, the weight of each input for each output.

    With a symbolic size the matrix is a traced float32 array.
    """
    if export.is_symbolic_dim(out_size) or export.is_symbolic_dim(in_size):
        out_sizes, in_sizes = (jnp.asarray([size], jnp.int32) for size in (out_size, in_size))
        return _bilinear_matrices(out_size, in_size, out_sizes, in_sizes, align_corners)[0]
    coordinates = np.clip(source_coordinates(out_size, in_size, align_corners), 0, in_size - 1)
    return np.maximum(0, 1 - np.abs(coordinates[:, None] - np.arange(in_size)[None, :]))


def source_coordinates(
    out_size: int, in_size: int, align_corners: bool = False
) -> Float[np.ndarray, " out_size"]:
    """Returns the coordinate of each output pixel's centre in the input, in input pixels."""
    if align_corners:
        return np.arange(out_size) * (in_size - 1) / max(out_size - 1, 1)
    return (np.arange(out_size) + 0.5) * in_size / out_size - 0.5


def _bilinear_matrices(
    out_side: Size,
    in_side: Size,
    out_sizes: Int[Array, " n"],
    in_sizes: Int[Array, " n"],
    align_corners: bool,
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
    if align_corners:
        denominator = jnp.maximum(out_sizes[:, None] - 1, 1)
        numerator = jnp.arange(out_side) * (in_sizes[:, None] - 1)
    else:
        denominator = 2 * out_sizes[:, None]
        numerator = (2 * jnp.arange(out_side) + 1) * in_sizes[:, None] - out_sizes[:, None]
    numerator = jnp.clip(numerator, 0, denominator * (in_sizes[:, None] - 1))
    lower = (numerator // denominator)[..., None]
    fraction = (numerator % denominator / denominator)[..., None]
    index = jnp.arange(in_side)
    return jnp.where(index == lower, 1 - fraction, 0) + jnp.where(index == lower + 1, fraction, 0)
