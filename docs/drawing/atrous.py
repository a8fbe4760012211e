"""Section 3 of the guide: atrous convolution, as the project's own computes it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from deeplab_jax.models.ops.atrous_conv import atrous_conv
from deeplab_jax.visualization.canvas import BLUE, GREY, LIGHT, ORANGE, VERMILLION, Canvas
from drawing.labels import images
from drawing.sheet import (
    MARGIN,
    PAPER,
    WIDTH,
    Picture,
    colored,
    enlarged,
    framed,
    grid_lines,
    lines_of_text,
    polyline_arrow,
    viridis,
)

Map = Float[np.ndarray, "h w"]

RATES = (1, 2, 4)
STACKS = ((2, 2, 2), (1, 2, 3), (1, 2, 4), (2, 4, 8))


def paths(rates: Sequence[int], size: int) -> Float[np.ndarray, "size size"]:
    """Ways from each pixel to the middle one through 3x3 convolutions of ones, one a rate.

    It is the gradient of the middle output by the map: 0 where nothing is read.
    """
    ones = jnp.ones((3, 3, 1, 1))

    def middle(x: jax.Array) -> jax.Array:
        for rate in rates:
            x = atrous_conv(x, ones, kernel_dilation=rate, method="native")
        return x[0, size // 2, size // 2, 0]

    return np.asarray(jax.grad(middle)(jnp.zeros((1, size, size, 1))))[0, :, :, 0]


def side_of(seen: Map) -> int:
    """Side of the least square that holds what is not 0."""
    rows = np.flatnonzero(seen.any(1))
    return int(rows[-1] - rows[0] + 1)


def atrous() -> Picture:
    """A 3x3's taps by rate; rate 2 against a shrunk map."""
    canvas = Canvas(WIDTH, 722)
    cells, side = 11, 20
    for column, rate in enumerate(RATES):
        left, top = MARGIN + column * 240, 58
        seen = paths([rate], cells)
        canvas.text(left, 24, f"rate {rate}", size=16)
        canvas.text(left, 44, f"field of view {side_of(seen)}", size=14, color=GREY)
        picture = colored((seen > 0).astype(np.uint8), {0: PAPER, 1: BLUE})
        middle = cells // 2
        picture[middle, middle] = ORANGE
        canvas.paste(enlarged(picture, side), left, top)
        grid_lines(canvas, left, top, (cells, cells), side)
    x = MARGIN + 3 * 240
    lines_of_text(canvas, x, 68, ("The 9 weights of", "a 3x3 kernel lie", "here."), size=15)
    canvas.box(x, 144, x + 14, 158, fill=ORANGE)
    lines_of_text(canvas, x + 22, 151, ("is its centre,", "where the", "output lies."), size=15)
    _two_ways(canvas, 322)
    return canvas.picture()


def two_ways() -> tuple[Map, Map, Map, Map]:
    """A map; every second pixel of it; and a 3x3 on both, at rate 1 on the shrunk, 2 on the whole.

    Returns:
      The map `[18, 18]`, the shrunk one `[9, 9]`, and the two results, of their sizes.
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


def _two_ways(canvas: Canvas, top: int) -> None:
    """Above: shrink, then convolve. Below: convolve at rate 2; a quarter of it is the same."""
    whole, shrunk, above, below = two_ways()
    scale = np.abs(below).max()
    canvas.line([(MARGIN, top - 22), (WIDTH - MARGIN, top - 22)], LIGHT)
    canvas.text(MARGIN, top, "the same kernel, on every second pixel and on all", size=16)
    factor = 10
    side = 18 * factor
    y = top + 44
    x_map, x_shrunk, x_result = MARGIN, 290, 500
    y_below = y + 9 * factor + 70
    y_map = (y + y_below + side) // 2 - side // 2
    framed(canvas, enlarged(viridis(whole), factor), x_map, y_map)
    canvas.text(x_map, y_map - 16, "map of 18x18", size=14, color=GREY)
    framed(canvas, enlarged(viridis(shrunk), factor), x_shrunk, y)
    canvas.text(x_shrunk, y - 16, "every second pixel", size=14, color=GREY)
    framed(canvas, enlarged(viridis(0.5 + 0.5 * above / scale), factor), x_result, y)
    canvas.text(x_result, y - 16, "3x3 at rate 1: 9x9 answers", size=14, color=GREY)
    framed(canvas, enlarged(viridis(0.5 + 0.5 * below / scale), factor), x_result, y_below)
    canvas.text(x_result, y_below - 16, "3x3 at rate 2: 18x18 answers", size=14, color=GREY)
    for row in range(0, 18, 2):
        for column in range(0, 18, 2):
            left, upper = x_result + column * factor, y_below + row * factor
            canvas.box(
                left,
                upper,
                left + factor - 1,
                upper + factor - 1,
                outline=VERMILLION,
                thickness=1.3,
            )
    x_turn, y_middle = x_map + side + 18, y_map + side / 2
    for target, height in ((x_shrunk - 8, y + 45), (x_result - 8, y_below + side / 2)):
        points = [(x_map + side + 4, y_middle), (x_turn, y_middle), (x_turn, height)]
        polyline_arrow(canvas, [*points, (target, height)])
    canvas.arrow((x_shrunk + 9 * factor + 4, y + 45), (x_result - 8, y + 45))
    difference = np.abs(below[::2, ::2] - above).max()
    lines = (
        "those framed are the",
        "answers above: the largest",
        f"difference is {difference:.1g}",
    )
    lines_of_text(canvas, x_result + side + 18, y_below + side / 2 - 20, lines)
    beside = ("a quarter of the positions,", "the same field of view")
    lines_of_text(canvas, x_result + side + 18, y + 34, beside)


def gridding() -> Picture:
    """What three 3x3 convolutions read, by their rates."""
    canvas = Canvas(WIDTH, 336)
    size, factor = 31, 6
    for column, rates in enumerate(STACKS):
        left, top = MARGIN + column * 220, 52
        seen = paths(rates, size)
        side = side_of(seen)
        canvas.text(left, 26, f"rates {', '.join(map(str, rates))}", size=17)
        colors = viridis(1 - 0.85 * np.sqrt(seen / seen.max()))
        colors[seen == 0] = PAPER
        framed(canvas, enlarged(colors, factor), left, top)
        first = (size - side) // 2 * factor
        canvas.box(
            left + first - 1, top + first - 1, left + first + side * factor,
            top + first + side * factor, outline=VERMILLION, thickness=1.5,
        )  # fmt: skip
        lines = (f"sees {side} pixels wide,", f"{(seen > 0).sum()} of {side**2} of them")
        lines_of_text(canvas, left, top + size * factor + 20, lines, size=15)
    canvas.text(
        MARGIN, 318, "white: not read; darker: read along more paths; framed: the field of view",
        size=14, color=GREY,
    )  # fmt: skip
    return canvas.picture()
