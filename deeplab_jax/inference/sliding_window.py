"""Places windows over an image and adds up their probabilities in a band of rows.

A band is as high as a window and as wide as the (padded) image. It moves down the image with the
rows of windows, so that memory does not grow with the image's height.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """Returns the windows' first pixels along a side, evenly spaced, as few as `overlap` allows."""
    if side <= window:
        return [0]
    step = max(1, window - round(window * overlap))
    gaps = -(-(side - window) // step)
    return [round(index * (side - window) / gaps) for index in range(gaps + 1)]


def window_weights(side: int) -> Float32[np.ndarray, " side"]:
    """Returns the weights along a window: a triangle, 1 in the middle and nowhere 0."""
    index = np.arange(side)
    return (np.minimum(index + 1, side - index) / ((side + 1) // 2)).astype(np.float32)


def add_windows(
    band: Float[Array, "window w classes"],
    weighted: Float[Array, "n window window classes"],
    lefts: Int[Array, " n"],
    included: Bool[Array, " n"],
) -> Float[Array, "window w classes"]:
    """Adds the included windows to the band, each from its left column on."""
    for window, left, include in zip(weighted, lefts, included, strict=True):
        covered = lax.dynamic_slice_in_dim(band, left, window.shape[1], axis=1)
        covered = covered + jnp.where(include, window, 0)
        band = lax.dynamic_update_slice_in_dim(band, covered, left, axis=1)
    return band


def shift_up(
    band: Float[Array, "window w classes"], rows: Int[Array, ""]
) -> Float[Array, "window w classes"]:
    """Removes the first rows of the band, and appends as many rows of zeros."""
    kept = jnp.arange(band.shape[0])[:, None, None] < band.shape[0] - rows
    return jnp.where(kept, jnp.roll(band, -rows, axis=0), 0)


def band_ids(band: Float[Array, "window w classes"]) -> UInt8[Array, "window w"]:
    return jnp.argmax(band, axis=-1).astype(jnp.uint8)
