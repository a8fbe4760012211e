"""Bilinear resizing, the one rule by which logits reach the size of images and labels."""

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

# Precision is asked for because a product's default on GPU and TPU rounds logits to ~3 digits.
product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def resize_bilinear(
    x: Float[Array, "n h w c"],
    height: Size,
    width: Size,
    *,
    in_sizes: Int[Array, "n 2"] | None = None,
    out_sizes: Int[Array, "n 2"] | None = None,
) -> Float[Array, "n height width c"]:
    """Resizes bilinearly with half-pixel centres, clamped edges and no antialiasing.

    It is torch's `interpolate(mode="bilinear", align_corners=False)`, written as two products with
    small constant matrices. Their gradient has no scatter and is the same in each run.

    Args:
      x: map.
      height, width: of the result, pixels.
      in_sizes: rows and columns of `x` that belong to each image; the padding beyond must be
        finite. None means all.
      out_sizes: rows and columns that `in_sizes` are resized to; values beyond them have no
        meaning. Given together with `in_sizes`.
    """
    # Columns first, while there are few rows: the large product then is one plain product an image.
    if in_sizes is not None and out_sizes is not None:
        down, across = (
            _bilinear_matrices(side, x.shape[1 + axis], out_sizes[:, axis], in_sizes[:, axis])
            for axis, side in enumerate((height, width))
        )
        wide = product("nWw,nhwc->nhWc", across.astype(x.dtype), x)
        return product("nHh,nhWc->nHWc", down.astype(x.dtype), wide)
    if x.shape[1:3] == (height, width):
        return x
    return bilinear_resize(x, height=height, width=width)


def resize_like(
    x: Float[Array, "n h w c"], like: Float[Array, "n height width other"]
) -> Float[Array, "n height width c"]:
    """Resizes a map to the size of another one of the same images; respects the padding mask."""
    height, width = like.shape[1:3]
    return resize_bilinear(x, height, width, in_sizes=valid_sizes(x), out_sizes=valid_sizes(like))


@functools.partial(jax.jit, static_argnames=("height", "width"))
def bilinear_resize(
    x: Float[Array, "n h w c"], *, height: Size, width: Size
) -> Float[Array, "n height width c"]:
    """Resizes a map without padding; a call of this name in a program, for exporters."""
    columns = bilinear_matrix(width, x.shape[2]).astype(x.dtype)
    rows = bilinear_matrix(height, x.shape[1]).astype(x.dtype)
    wide = product("Ww,nhwc->nhWc", columns, x)
    return product("nHh,nhWc->nHWc", for_each_image(rows, x), wide)


def for_each_image(matrix: Any, images: Array) -> Float[Array, "n rows columns"]:
    """The matrix once an image of a batch.

    The natural order of a product's axes is then nHWc; with one matrix it is HnWc, which would be
    transposed.
    """
    return jnp.broadcast_to(matrix, (images.shape[0], *matrix.shape))


def bilinear_matrix(out_size: Size, in_size: Size) -> Any:
    """float64 `[out_size, in_size]`: weight of each input for each output.

    Of sizes that are left open, as in an exported program, it is traced, and float32.
    """
    if export.is_symbolic_dim(out_size) or export.is_symbolic_dim(in_size):
        sizes = (jnp.asarray([size], jnp.int32) for size in (out_size, in_size))
        return _bilinear_matrices(out_size, in_size, *sizes)[0]
    places = np.clip(centres(out_size, in_size), 0, in_size - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(in_size)[None, :]))


def centres(pixels: int, others: int) -> Float[np.ndarray, " pixels"]:
    """Where the middles of a side's pixels lie on a side of others that covers the same."""
    return (np.arange(pixels) + 0.5) * others / pixels - 0.5


def _bilinear_matrices(
    out_side: Size, in_side: Size, out_sizes: Int[Array, " n"], in_sizes: Int[Array, " n"]
) -> Float[Array, "n out_side in_side"]:
    """`bilinear_matrix` of each image's own sizes, in the padded ones.

    Centres are fractions of integers: in float32 those of large images would be off by 1e-4.

    Raises:
      ValueError: sides whose products do not fit in 32 bits; those left open are not seen.
    """
    open_side = export.is_symbolic_dim(out_side) or export.is_symbolic_dim(in_side)
    if not open_side and (2 * out_side + 1) * in_side >= 2**31:
        raise ValueError(f"cannot resize a side of {in_side} to {out_side} pixels: too large")
    denominator = 2 * out_sizes[:, None]
    numerator = (2 * jnp.arange(out_side) + 1) * in_sizes[:, None] - out_sizes[:, None]
    numerator = jnp.clip(numerator, 0, denominator * (in_sizes[:, None] - 1))
    lower, share = (numerator // denominator)[..., None], numerator % denominator
    upper_share = (share / denominator)[..., None]
    index = jnp.arange(in_side)
    return jnp.where(index == lower, 1 - upper_share, 0) + jnp.where(
        index == lower + 1, upper_share, 0
    )
