"""Helpers that the guide's pictures share: maps as pixels, and grids over them."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from jaxtyping import Float, Integer, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

MARGIN = 20
WHITE = "#ffffff"

Pixels = UInt8[np.ndarray, "h w 3"]


def viridis(values: Float[np.ndarray, "h w"]) -> Pixels:
    """Shows values of 0..1 in 64 colours, few enough to keep files small."""
    index = np.rint(np.rint(63 * np.clip(values, 0, 1)) * 255 / 63).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(index, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def colored(ids: Integer[np.ndarray, "h w"], colors: Mapping[int, str]) -> Pixels:
    """Shows each id in its colour."""
    pixels = np.zeros((*ids.shape, 3), np.uint8)
    for index, color in colors.items():
        pixels[ids == index] = np.rint(255 * np.array(to_rgb(color)))
    return pixels


def grid_lines(axes: Axes, left: float, top: float, shape: tuple[int, int], side: float) -> None:
    """Draws the lines between the cells of a grid of `shape` rows and columns."""
    rows, columns = shape
    right, bottom = left + columns * side, top + rows * side
    style = {"color": "#c8c8c8", "linewidth": 0.8}
    axes.hlines([top + side * row for row in range(rows + 1)], left, right, **style)
    axes.vlines([left + side * column for column in range(columns + 1)], top, bottom, **style)
