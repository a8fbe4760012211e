"""Windows over an image, and the band of rows in which their probabilities are added up.

A band is as high as a window and as wide as the (padded) image. It moves down the image with the
rows of windows, so that what is held does not grow with the image's height.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """First pixels of the windows along a side: as few as `overlap` allows, evenly spaced."""
    if side <= window:
        return [0]
    step = max(1, window - round(window * overlap))
    gaps = -(-(side - window) // step)
    return [round(index * (side - window) / gaps) for index in range(gaps + 1)]


def window_weights(side: int) -> Float32[np.ndarray, " side"]:
    """Weight of each pixel along a window: a triangle that is never 0, and 1 in the middle."""
    index = np.arange(side)
    return (np.minimum(index + 1, side - index) / ((side + 1) // 2)).astype(np.float32)


def add_windows(
    band: Float[Array, "window w classes"],
    weighted: Float[Array, "n window window classes"],
    lefts: Int[Array, " n"],
    included: Bool[Array, " n"],
) -> Float[Array, "window w classes"]:
    """The band with those windows added that are included, each from its left column on."""
    for window, left, include in zip(weighted, lefts, included, strict=True):
        covered = lax.dynamic_slice_in_dim(band, left, window.shape[1], axis=1)
        covered = covered + jnp.where(include, window, 0)
        band = lax.dynamic_update_slice_in_dim(band, covered, left, axis=1)
    return band


def shift_up(
    band: Float[Array, "window w classes"], rows: Int[Array, ""]
) -> Float[Array, "window w classes"]:
    """The band without its first rows, and with as many of zeros below."""
    kept = jnp.arange(band.shape[0])[:, None, None] < band.shape[0] - rows
    return jnp.where(kept, jnp.roll(band, -rows, axis=0), 0)


def band_ids(band: Float[Array, "window w classes"]) -> UInt8[Array, "window w"]:
    return jnp.argmax(band, axis=-1).astype(jnp.uint8)
