"""Padding masks: images of many sizes through one compiled program, exactly.

A convolution pads its map with zeros. So zeros in the padding beyond an image, set again before
each layer that looks across pixels, give the logits of the image alone, up to rounding. In a map of
stride s the first `ceil(size / s)` rows and columns belong to the image, because each strided layer
turns `h` rows into `ceil(h / 2)`.

The sizes reach those layers through a context variable that is set and read while the model is
traced:

    with padding_mask(sizes, images.shape):
        features = backbone(images)

This is the package's only ambient state. It is safe because `DeepLabV3.__call__` sets it from its
own argument within one trace: no function that reads it is traced, or jitted, outside of that.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deeplab_jax.models.ops.atrous_conv import Size

STRIDES = tuple(2**halvings for halvings in range(9))  # of maps, pixels of the image


@dataclasses.dataclass(frozen=True)
class _Mask:
    sizes: Int[Array, "n 2"]
    padded: tuple[Size, Size]


_mask: contextvars.ContextVar[_Mask | None] = contextvars.ContextVar("padding_mask", default=None)


@contextlib.contextmanager
def padding_mask(sizes: Int[Array, "n 2"] | None, shape: tuple[Size, ...]) -> Iterator[None]:
    """Treats everything beyond each image's size as padding.

    Args:
      sizes: height and width of each image, pixels, at least 1 and at most the padded ones. None
        means that there is no padding.
      shape: `[n, h, w, c]` of the padded images.

    Raises:
      ValueError: there is not one size an image.
    """
    mask = None
    if sizes is not None:
        if sizes.shape != (shape[0], 2):
            raise ValueError(f"sizes must be [{shape[0]}, 2], got {list(sizes.shape)}")
        # A row that only fills up a batch may say 0x0.
        mask = _Mask(jnp.clip(sizes, 1, jnp.asarray(shape[1:3])), (shape[1], shape[2]))
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)


def valid_sizes(x: Float[Array, "n h w c"]) -> Int[Array, "n 2"] | None:
    """Returns the rows and columns of a map that belong to each image; None without padding.

    Raises:
      ValueError: the map has the size of the padded images at no stride up to 256.
    """
    mask = _mask.get()
    if mask is None:
        return None
    # Two strides give as many rows only if that is one, and then it is one of each image too.
    for stride in STRIDES:
        if x.shape[1:3] == tuple(-(-side // stride) for side in mask.padded):
            return (mask.sizes + stride - 1) // stride
    raise ValueError(
        f"a map of {x.shape[1]}x{x.shape[2]} is none of images of "
        f"{mask.padded[0]}x{mask.padded[1]} at a stride of 1, 2, ..., {STRIDES[-1]}"
    )


def mask_padding(x: Float[Array, "n h w c"], value: float = 0.0) -> Float[Array, "n h w c"]:
    """Sets the padding of a map to `value`."""
    sizes = valid_sizes(x)
    if sizes is None:
        return x
    return jnp.where(_valid(x, sizes), x, jnp.asarray(value, x.dtype))


def _valid(x: Array, sizes: Int[Array, "n 2"]) -> Bool[Array, "n h w 1"]:
    rows = jnp.arange(x.shape[1]) < sizes[:, :1]
    columns = jnp.arange(x.shape[2]) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[..., None]
