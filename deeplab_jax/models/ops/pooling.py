"""Pooling over windows and over images, with regard to the padding mask.

`max_pool_3x3`, `average_pool_2x2`, `average_pool_2x2_dense` and `global_mean` ignore the mask. They
are jitted, so that a traced program contains calls by these names, which exporters replace by one
operator.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deeplab_jax.models.ops.masking import mask_padding, valid_sizes


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo c"]:
    """Takes the maximum of 3x3 windows with stride 2 and padding 1, giving `ceil(h / 2)` rows."""
    # Windows outside the image give the lowest value, which would overflow in the next layer.
    return mask_padding(max_pool_3x3(mask_padding(x, float(jnp.finfo(x.dtype).min))))


@jax.jit
def max_pool_3x3(x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo c"]:
    """Takes maxima along one axis, then along the other.

    On CPU this is 4 times as fast as `lax.reduce_window`, and 17 times with the gradient, which is
    a scatter there. Pads with the lowest finite value, since -inf could give NaN later.
    """
    lowest = float(jnp.finfo(x.dtype).min)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=lowest)
    return _max_of_three(_max_of_three(padded, axis=2), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_three(x: Array, axis: int) -> Array:
    """Takes the maximum of three neighbours at every second position along an axis.

    The gradient goes to the first of equal values, as in torch. It is put together from the even
    and the odd positions; the one that JAX derives spreads six maps over all positions and adds
    them up, which took 0.7 ms of ResNet-101's step on an H200.
    """
    return functools.reduce(jnp.maximum, _neighbours(x, axis))


def _neighbours(x: Array, axis: int) -> list[Array]:
    last = x.shape[axis] - 3
    return [lax.slice_in_dim(x, i, i + last + 1, stride=2, axis=axis) for i in range(3)]


def _max_of_three_forward(x: Array, axis: int) -> tuple[Array, tuple[Array, Array]]:
    y = _max_of_three(x, axis)
    return y, (x, y)


def _max_of_three_backward(axis: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array]:
    x, y = residuals
    left, middle, _ = (neighbour == y for neighbour in _neighbours(x, axis))
    zero = jnp.zeros((), dy.dtype)
    to_left = jnp.where(left, dy, zero)
    to_middle = jnp.where(middle & ~left, dy, zero)
    to_right = jnp.where(left | middle, zero, dy)
    before, after = ([(0, 0, 0)] * x.ndim for _ in range(2))
    before[axis], after[axis] = (1, 0, 0), (0, 1, 0)
    even = lax.pad(to_left, zero, after) + lax.pad(to_right, zero, before)
    odd = lax.pad(to_middle, zero, after)
    count, length = even.shape[axis], x.shape[axis]
    dx = jnp.stack([even, odd], axis + 1)
    dx = dx.reshape(*x.shape[:axis], 2 * count, *x.shape[axis + 1 :])
    if 2 * count < length:  # a last position that no window reads
        after[axis] = (0, length - 2 * count, 0)
        return (lax.pad(dx, zero, after),)
    return (lax.slice_in_dim(dx, 0, length, axis=axis),)


_max_of_three.defvjp(_max_of_three_forward, _max_of_three_backward)


def average_pool(x: Float[Array, "n h w c"], strides: int) -> Float[Array, "n ho wo c"]:
    """Averages 2x2 windows; the first one begins at the first pixel.

    At stride 2 the result has `ceil(h / 2)` rows, and pixels outside the image do not count. At
    stride 1 it has `h` rows, and pixels outside the image count as zeros. This is the shortcut of
    timm's ResNet-D: `AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)`, or `AvgPool2dSame`
    where the stride was removed.
    """
    sizes = valid_sizes(x)
    if sizes is not None:
        return _average(mask_padding(x), sizes, strides)
    return average_pool_2x2(x) if strides == 2 else average_pool_2x2_dense(x)


@jax.jit
def average_pool_2x2(x: Float[Array, "n h w c"]) -> Float[Array, "n ho wo c"]:
    """Averages with stride 2 over the pixels of each window that are inside the map."""
    return _average(x, jnp.asarray([x.shape[1:3]], jnp.int32), strides=2)


@jax.jit
def average_pool_2x2_dense(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Averages with stride 1; pixels below and to the right of the map count as zeros."""
    return _average(x, None, strides=1)


def _average(x: Array, sizes: Int[Array, "n 2"] | None, strides: int) -> Array:
    pads = ((0, 0), (0, 1), (0, 1), (0, 0))
    total = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, strides, strides, 1), pads)
    if strides == 1 or sizes is None:
        return total / 4
    rows, columns = (
        jnp.clip(sizes[:, axis, None] - 2 * jnp.arange(total.shape[1 + axis]), 1, 2)
        for axis in (0, 1)
    )
    return total / (rows[:, :, None] * columns[:, None, :])[..., None].astype(x.dtype)


def mean_over_image(x: Float[Array, "n h w c"], dtype: Any) -> Float[Array, "n 1 1 c"]:
    """Averages over the pixels of each image without its padding; sums in `dtype`."""
    sizes = valid_sizes(x)
    if sizes is None:
        return global_mean(x, dtype=jnp.dtype(dtype))
    total = jnp.sum(mask_padding(x), (1, 2), keepdims=True, dtype=dtype)
    return (total / jnp.prod(sizes, axis=1).reshape(-1, 1, 1, 1)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def global_mean(x: Float[Array, "n h w c"], *, dtype: Any) -> Float[Array, "n 1 1 c"]:
    """Averages over all pixels of a map; sums in `dtype`."""
    return jnp.mean(x, (1, 2), keepdims=True, dtype=dtype).astype(x.dtype)
