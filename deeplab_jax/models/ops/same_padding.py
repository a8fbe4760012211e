"""TensorFlow's padding SAME of convolutions with stride 2 and an odd kernel.

TensorFlow pads as few zeros as possible, the smaller half of them before the map. At a side of odd
size that is symmetric padding: the centres of the kernel are pixels 0, 2, 4, ... At a side of even
size they are pixels 1, 3, 5, ... `lax.conv_general_dilated` pads like this for known sizes. Here a
convolution with symmetric padding does, which may be faster. The sizes may also be unknown while
tracing: those of images under a padding mask, where each image has its own, and symbolic ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames=("convolve", "padding", "options"))
def same_conv(
    x: Float[Array, "n h w cin"],
    kernel: Float[Array, "k k cin_per_group cout"],
    sizes: Int[Array, "n 2"] | None,
    *,
    convolve: Callable[..., Array],
    padding: tuple[tuple[int, int], ...],
    options: tuple[tuple[str, Any], ...] = (),
) -> Float[Array, "n ho wo cout"]:
    """Convolves at stride 2 with padding SAME, which gives `ceil(h / 2)` rows.

    Shifts a side of even size by one row of zeros, so that its centres are at the even rows, and
    drops the output of the added row. It is jitted, so that a traced program contains calls by this
    name, which exporters replace by one operator.

    Args:
      x: a map that is zero outside the images.
      kernel: weights with an odd side.
      sizes: number of rows and columns of each image; None means those of the map.
      convolve: a convolution with the signature of `lax.conv_general_dilated`, and `options` its
        other arguments.
      padding: the symmetric padding of both axes.
    """

    def pad(axis: int, before: int, after: int) -> Array:
        return jnp.pad(x, [(before, after) if each == axis else (0, 0) for each in range(4)])

    starts = []
    for axis in (1, 2):
        side: Any = x.shape[axis] if sizes is None else sizes[:, axis - 1, None, None, None]
        is_odd = side % 2
        if sizes is None and not export.is_symbolic_dim(is_odd):
            start = 1 - is_odd
            x = pad(axis, start, 0)
        else:
            start = 1  # at an odd side two rows before, so that both sums have the same shape
            x = jnp.where(jnp.asarray(is_odd) == 1, pad(axis, 2, 0), pad(axis, 1, 1))
        starts.append(start)
    y = convolve(x, kernel, (2, 2), padding, **dict(options))
    return y[:, starts[0] :, starts[1] :]
