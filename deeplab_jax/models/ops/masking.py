"""Padding masks, for images of different sizes in one batch.

A convolution pads its input with zeros. So if the padding of an image is set to zero before each
layer that reads neighbouring pixels, the logits on the image are those of the image without
padding, up to rounding. In a map of stride s the first `ceil(size / s)` rows and columns belong to
the image, because each layer of stride 2 turns `h` rows into `ceil(h / 2)`.

The sizes reach those layers through a context variable that is set and read during tracing:

    with padding_mask(sizes, images.shape):
        features = backbone(images)

It is the only context variable of the package. `DeepLabV3.__call__` sets it from its own argument,
and the functions that read it are traced only within that call, so that no function is jitted with
one mask and run with another.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deeplab_jax.models.ops.atrous_conv import Size

STRIDES = tuple(2**halvings for halvings in range(9))  # of maps, pixels of the image


class _Mask(NamedTuple):
    sizes: Int[Array, "n 2"]
    padded_size: tuple[Size, Size]


_mask: contextvars.ContextVar[_Mask | None] = contextvars.ContextVar("padding_mask", default=None)


@contextlib.contextmanager
def padding_mask(sizes: Int[Array, "n 2"] | None, shape: tuple[Size, ...]) -> Iterator[None]:
    """Sets the padding mask while a model is traced.

    Args:
      sizes: height and width of each image in pixels, clipped to 1 and the padded size. None means
        no padding.
      shape: `[n, h, w, c]` of the padded images.

    Raises:
      ValueError: `sizes` is not `[n, 2]`.
    """
    mask = None
    if sizes is not None:
        if sizes.shape != (shape[0], 2):
            raise ValueError(f"sizes must be [{shape[0]}, 2], got {list(sizes.shape)}")
        # Rows that only complete a batch may have size 0x0.
        mask = _Mask(jnp.clip(sizes, 1, jnp.asarray(shape[1:3])), (shape[1], shape[2]))
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)


def valid_sizes(x: Float[Array, "n h w c"]) -> Int[Array, "n 2"] | None:
    """Returns the rows and columns of a map that belong to each image; None without a mask.

    Raises:
      ValueError: the map does not have the size of the padded images at any stride in `STRIDES`.
    """
    mask = _mask.get()
    if mask is None:
        return None
    # Two strides give the same number of rows only if it is 1, for the padded size and each image.
    for stride in STRIDES:
        if x.shape[1:3] == tuple(-(-side // stride) for side in mask.padded_size):
            return (mask.sizes + stride - 1) // stride
    raise ValueError(
        f"a map of {x.shape[1]}x{x.shape[2]} is not that of images of {mask.padded_size[0]}x"
        f"{mask.padded_size[1]} at a stride of 1, 2, ..., {STRIDES[-1]}: pad each strided layer so "
        "that it gives ceil(size / stride) rows"
    )


def mask_padding(x: Float[Array, "n h w c"], value: float = 0.0) -> Float[Array, "n h w c"]:
    """Returns a map with its padding set to `value`; unchanged without a padding mask."""
    sizes = valid_sizes(x)
    return x if sizes is None else mask_outside(x, sizes, value)


def mask_outside(
    x: Float[Array, "n h w c"], sizes: Int[Array, "n 2"], value: float = 0.0
) -> Float[Array, "n h w c"]:
    """Returns a map with `value` outside each image's rows and columns."""
    rows = jnp.arange(x.shape[1]) < sizes[:, :1]
    columns = jnp.arange(x.shape[2]) < sizes[:, 1:]
    valid = (rows[:, :, None] & columns[:, None, :])[..., None]
    return jnp.where(valid, x, jnp.asarray(value, x.dtype))
