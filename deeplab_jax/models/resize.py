"""Resizing maps: bilinear, and the learned decoder."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export, lax
from jaxtyping import Array, Float, Int

from deeplab_jax.models.layers import full_precision
from deeplab_jax.models.operations import Size, operation
from deeplab_jax.models.partition import whole_height

MAX_SIDE = 32767  # pixels; coordinates of larger sides overflow 32 bits where sizes are traced

# Precision is asked for because a product's default on GPU and TPU rounds logits to ~3 digits.
product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@operation
def resize_bilinear(
    x: Float[Array, "n h w c"],
    height: Size,
    width: Size,
    *,
    in_sizes: Int[Array, "n 2"] | None = None,
    out_sizes: Int[Array, "n 2"] | None = None,
) -> Float[Array, "n height width c"]:
    """Bilinear resize with half-pixel centres, edges clamped, no antialiasing.

    It is torch's `interpolate(mode="bilinear", align_corners=False)`, written as two products with
    small constant matrices, whose gradient has no scatter and is the same in each run.

    Args:
      x: map.
      height, width: of the result, pixels.
      in_sizes: rows and columns of `x` that belong to each image, where the others are padding
        and finite; None: all.
      out_sizes: those of the result that `in_sizes` are resized to; what lies beyond them has no
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


class TransposedDecoder(nnx.Module):
    """Upsamples each class by its own transposed convolution, which starts as bilinear.

    The kernel of stride s has a side of 2s. It is kept for the largest output stride and averaged
    down for smaller ones: the mean of a triangle over equal cells is the coarser triangle, so it
    starts bilinear at each output stride while the parameters have one shape for all of them.

    Attributes:
      kernel: `[64, 64, num_classes]`.
      stride: output stride of the logits that it is given, a divisor of 32.
    """

    LARGEST = 32  # output stride, pixels

    def __init__(self, num_classes: int, stride: int, *, dtype: Any = jnp.float32) -> None:
        triangle = 1 - np.abs((np.arange(2 * self.LARGEST) + 0.5) / self.LARGEST - 1)
        kernel = np.outer(triangle, triangle)[:, :, None].repeat(num_classes, axis=2)
        self.kernel = nnx.Param(jnp.asarray(kernel, full_precision(dtype)))
        self.stride = stride

    def __call__(
        self,
        logits: Float[Array, "n h w classes"],
        height: Size,
        width: Size,
        *,
        in_sizes: Int[Array, "n 2"] | None = None,
        out_sizes: Int[Array, "n 2"] | None = None,
    ) -> Float[Array, "n height width classes"]:
        """Upsamples by `stride`, then cuts the middle `height x width` out.

        With sizes, those of each image without its padding, as in `resize_bilinear`.
        """
        logits = whole_height(logits)
        n, h, w, num_classes = logits.shape
        if in_sizes is not None:
            logits = _repeat_edges(logits, in_sizes)
        stride, cell = self.stride, self.LARGEST // self.stride
        kernel = self.kernel[...].reshape(2 * stride, cell, 2 * stride, cell, num_classes)
        kernel = kernel.mean((1, 3)).reshape(2, stride, 2, stride, num_classes)
        # Each block of stride x stride outputs between four neighbours is a weighted sum of them.
        padded = jnp.pad(logits, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        blocks = sum(
            padded[:, 1 - a : h + 2 - a, None, 1 - b : w + 2 - b, None] * kernel[a, :, b][:, None]
            for a in (0, 1)
            for b in (0, 1)
        )
        upsampled = cast(Array, blocks).reshape(n, (h + 1) * stride, (w + 1) * stride, num_classes)
        if in_sizes is not None and out_sizes is not None:
            starts = stride // 2 + (in_sizes * stride - out_sizes) // 2
            return jax.vmap(
                lambda x, start: lax.dynamic_slice(x, (*start, 0), (height, width, num_classes))
            )(upsampled, starts)
        top = stride // 2 + (h * stride - height) // 2
        left = stride // 2 + (w * stride - width) // 2
        return upsampled[:, top : top + height, left : left + width]


def _repeat_edges(x: Float[Array, "n h w c"], sizes: Int[Array, "n 2"]) -> Array:
    """The map with each image's last row and column repeated over its padding."""
    rows = jnp.minimum(jnp.arange(x.shape[1]), sizes[:, :1] - 1)
    columns = jnp.minimum(jnp.arange(x.shape[2]), sizes[:, 1:] - 1)
    return jax.vmap(lambda x, row, column: x[row][:, column])(x, rows, columns)
