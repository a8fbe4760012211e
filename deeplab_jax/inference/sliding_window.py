"""Places windows over an image and adds up their probabilities in a band of rows.

A band is as high as a window and as wide as the (padded) image. It moves down the image with the
rows of windows, so that memory does not grow with the image's height.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int


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


def total_weights(side: int, window: int, overlap: float) -> Float32[np.ndarray, " side"]:
    """Sums the weights of the windows at each pixel along a side."""
    weights, total = window_weights(min(window, side)), np.zeros(side, np.float32)
    for start in window_starts(side, window, overlap):
        total[start : start + len(weights)] += weights
    return total


def add_window(
    band: Float[Array, "window w classes"],
    weighted: Float[Array, "n window window classes"],
    place: Int[Array, " 3"],
) -> Float[Array, "window w classes"]:
    """Moves the band down and adds a window.

    `place` holds the index of the window in `weighted`; the number of rows to move the band, whose
    last rows become zeros; and the window's left column.
    """
    index, rows, left = place
    kept = jnp.arange(band.shape[0])[:, None, None] < band.shape[0] - rows
    band = lax.cond(
        rows > 0, lambda x: jnp.where(kept, jnp.roll(x, -rows, axis=0), 0), lambda x: x, band
    )
    covered = lax.dynamic_slice_in_dim(band, left, weighted.shape[2], axis=1)
    return lax.dynamic_update_slice_in_dim(band, covered + weighted[index], left, axis=1)
