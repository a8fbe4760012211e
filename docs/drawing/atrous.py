"""Section 3 of the guide: atrous convolution, as the project's own computes it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deeplab_jax.models.ops.atrous_conv import atrous_conv
from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import BLUE, GREY, LIGHT, ORANGE, VERMILLION
from drawing.labels import images
from drawing.sheet import MARGIN, WHITE, colored, grid_lines, viridis

Map = Float[np.ndarray, "h w"]

RATES = (1, 2, 4)
STACKS = ((2, 2, 2), (1, 2, 3), (1, 2, 4), (2, 4, 8))


def paths(rates: Sequence[int], size: int) -> Float[np.ndarray, "size size"]:
    """Counts the paths from each pixel to the central output of 3x3 convolutions at these rates.

    With kernels of ones it is the gradient of that output with respect to the map: 0 for pixels
    that are not read.
    """
    ones = jnp.ones((3, 3, 1, 1))

    def middle(x: jax.Array) -> jax.Array:
        for rate in rates:
            x = atrous_conv(x, ones, kernel_dilation=rate, method="native")
        return x[0, size // 2, size // 2, 0]

    return np.asarray(jax.grad(middle)(jnp.zeros((1, size, size, 1))))[0, :, :, 0]


def side_of(seen: Map) -> int:
    """Side of the smallest square that holds all values other than 0."""
    rows = np.flatnonzero(seen.any(1))
    return int(rows[-1] - rows[0] + 1)


def atrous() -> Figure:
    """A 3x3 kernel's taps by rate; rate 2 compared with a shrunk map."""
    figure, axes = plots.diagram(plots.WIDTH, 730)
    cells, side = 11, 20
    for column, rate in enumerate(RATES):
        left, top = MARGIN + column * 240, 62
        taps = paths([rate], cells)
        plots.text(axes, left, 22, f"rate {rate}", size=12)
        plots.text(axes, left, 45, f"field of view {side_of(taps)}", color=GREY)
        pixels = colored((taps > 0).astype(np.uint8), {0: WHITE, 1: BLUE})
        pixels[cells // 2, cells // 2] = colored(np.zeros((1, 1), int), {0: ORANGE})[0, 0]
        plots.picture(axes, pixels, left, top, side)
        grid_lines(axes, left, top, (cells, cells), side)
    x = MARGIN + 3 * 240 + 6
    for y, color, words in (
        (80, BLUE, "a weight of the\n3x3 kernel"),
        (140, ORANGE, "the central one,\nat the output"),
    ):
        plots.legend(axes, x, y, [(color, "")])
        plots.text(axes, x + 22, y - 5, words, va="top")
    _draw_two_ways(axes, 326)
    return figure


def two_ways() -> tuple[Map, Map, Map, Map]:
    """Convolves every second pixel of a map at rate 1, and the whole map at rate 2.

    Returns:
      The map `[18, 18]`, every second pixel of it `[9, 9]`, and the results of the latter and of
      the former, of the same sizes.
    """
    grey = images()[15]["image"].astype(np.float32).mean(2)
    whole = grey[:180, :180].reshape(18, 10, 18, 10).mean((1, 3)) / 255
    kernel = jnp.asarray([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])[:, :, None, None]  # Sobel's

    def convolved(x: Map, rate: int) -> Map:
        images = jnp.asarray(x)[None, :, :, None]
        y = atrous_conv(images, kernel, kernel_dilation=rate, method="native")
        return np.asarray(y)[0, :, :, 0]

    shrunk = whole[::2, ::2]
    return whole, shrunk, convolved(shrunk, 1), convolved(whole, 2)


def _draw_two_ways(axes: Axes, top: float) -> None:
    """Above: shrink, then convolve. Below: convolve at rate 2; a quarter of its outputs agree."""
    whole, shrunk, above, below = two_ways()
    scale = np.abs(below).max()
    plots.arrow(
        axes, [(MARGIN, top - 26), (plots.WIDTH - MARGIN, top - 26)], head=False, color=LIGHT
    )
    plots.text(axes, MARGIN, top, "the same kernel on every second pixel, and on all", size=12)
    cell, side = 10, 180
    y = top + 50
    x_map, x_shrunk, x_result = MARGIN, 290, 500
    y_below = y + 9 * cell + 66
    y_map = (y + y_below + side) / 2 - side / 2
    for x, y_picture, values, title in (
        (x_map, y_map, whole, "map of 18x18"),
        (x_shrunk, y, shrunk, "every second pixel"),
        (x_result, y, 0.5 + 0.5 * above / scale, "3x3 at rate 1: 9x9 outputs"),
        (x_result, y_below, 0.5 + 0.5 * below / scale, "3x3 at rate 2: 18x18 outputs"),
    ):
        plots.text(axes, x, y_picture - 16, title, color=GREY)
        plots.picture(axes, viridis(values), x, y_picture, cell)
    for row in range(0, 18, 2):
        for column in range(0, 18, 2):
            corner = x_result + column * cell + 1, y_below + row * cell + 1
            plots.box(axes, *corner, cell - 2, cell - 2, edge=VERMILLION, line=1.0, rounding=0)
    x_turn, y_middle = x_map + side + 20, y_map + side / 2
    for target, height in ((x_shrunk - 6, y + 45), (x_result - 6, y_below + side / 2)):
        start = x_map + side + 5, y_middle
        plots.arrow(axes, [start, (x_turn, y_middle), (x_turn, height), (target, height)])
    plots.arrow(axes, [(x_shrunk + 9 * cell + 5, y + 45), (x_result - 6, y + 45)])
    difference = np.abs(below[::2, ::2] - above).max()
    x = x_result + side + 16
    words = "a quarter of the positions,\nthe same field of view"
    plots.text(axes, x, y + 45, words)
    words = f"framed: the outputs\nabove; largest\ndifference {difference:.1g}"
    plots.text(axes, x, y_below + side / 2, words)


def gridding() -> Figure:
    """Which pixels three 3x3 convolutions read, by their rates."""
    figure, axes = plots.diagram(plots.WIDTH, 344)
    size, cell = 31, 6
    for column, rates in enumerate(STACKS):
        left, top = MARGIN + column * 220, 50
        counts = paths(rates, size)
        side = side_of(counts)
        plots.text(axes, left, 24, f"rates {', '.join(map(str, rates))}", size=12)
        pixels = viridis(1 - 0.85 * np.sqrt(counts / counts.max()))
        pixels[counts == 0] = 255
        plots.picture(axes, pixels, left, top, cell)
        first = (size - side) // 2 * cell
        frame = left + first, top + first, side * cell, side * cell
        plots.box(axes, *frame, edge=VERMILLION, line=1.4, rounding=0)
        words = f"field of view {side},\nreads {(counts > 0).sum()} of {side**2} pixels"
        plots.text(axes, left, top + size * cell + 16, words, size=10.5, va="top")
    words = "white: not read; darker: read along more paths; framed: the field of view"
    plots.text(axes, MARGIN, 320, words, color=GREY)
    return figure
