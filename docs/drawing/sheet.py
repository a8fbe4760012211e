"""What the guide's pictures share: a width, colours, maps as pictures, chains of boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from deeplab_jax.visualization.canvas import GREY, INK, Canvas, Color, Point, text_width

Picture = UInt8[np.ndarray, "h w 3"]
Values = Sequence[float] | np.ndarray

WIDTH = 900  # pixels, about as many as a page on GitHub shows
MARGIN = 20
PAPER: Color = (255, 255, 255)

# From light to dark with the output stride.
STRIDE_COLORS: dict[int | None, Color] = {
    1: (246, 246, 246),
    2: (228, 238, 248),
    4: (206, 225, 242),
    8: (180, 209, 234),
    16: (150, 192, 226),
    32: (118, 172, 216),
    64: (98, 156, 206),
    128: (80, 142, 198),
    256: (64, 128, 188),
    None: (240, 235, 215),  # behind a pooling to one pixel
}


def enlarged(picture: UInt8[np.ndarray, "h w 3"], factor: int) -> Picture:
    """Each pixel as a square."""
    return np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1)


def viridis(values: Float[np.ndarray, "h w"]) -> Picture:
    """Values of 0..1 in colours whose lightness alone tells the order; 64, to keep files small."""
    index = np.rint(np.rint(63 * np.clip(values, 0, 1)) * 255 / 63).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(index, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def colored(
    ids: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"], colors: dict[int, Color]
) -> Picture:
    """Each id in its colour."""
    picture = np.zeros((*ids.shape, 3), np.uint8)
    for index, color in colors.items():
        picture[ids == index] = color
    return picture


def framed(canvas: Canvas, picture: Picture, left: int, top: int) -> None:
    """A picture with a thin line around it."""
    canvas.paste(picture, left, top)
    height, width = picture.shape[:2]
    canvas.box(left - 1, top - 1, left + width, top + height, outline=GREY)


def lines_of_text(
    canvas: Canvas,
    x: float,
    y: float,
    lines: Sequence[str],
    *,
    size: int = 14,
    anchor: str = "lm",
    color: Color = INK,
) -> None:
    """Lines one below the other, the first at `y`."""
    for row, line in enumerate(lines):
        canvas.text(x, y + 1.45 * size * row, line, size=size, anchor=anchor, color=color)


def grid_lines(
    canvas: Canvas, left: float, top: float, cells: tuple[int, int], side: float
) -> None:
    """Lines between the cells of a grid of so many rows and columns."""
    rows, columns = cells
    for row in range(rows + 1):
        y = top + row * side
        canvas.line([(left, y), (left + columns * side, y)], (200, 200, 200))
    for column in range(columns + 1):
        x = left + column * side
        canvas.line([(x, top), (x, top + rows * side)], (200, 200, 200))


def polyline_arrow(canvas: Canvas, points: Sequence[Point], color: Color = GREY) -> None:
    """A broken line whose last part goes to the right and ends in a head."""
    canvas.line(points[:-1], color, 1.2)
    canvas.arrow(points[-2], points[-1], color)


def down_arrow(canvas: Canvas, x: float, top: float, bottom: float, color: Color = GREY) -> None:
    """Downwards, with a head."""
    canvas.line([(x, top), (x, bottom - 1)], color, 1.2)
    canvas.line([(x - 4, bottom - 7), (x, bottom), (x + 4, bottom - 7)], color, 1.2)


@dataclasses.dataclass(frozen=True)
class Axes:
    """A plot's place on the canvas, and what its sides stand for.

    Attributes:
      left, top, width, height: of the plot, pixels.
      x_range, y_range: values at its left and right, bottom and top.
    """

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def point(self, x: float, y: float) -> Point:
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        return (
            self.left + self.width * (x - x0) / (x1 - x0),
            self.top + self.height * (y1 - y) / (y1 - y0),
        )

    def points(self, xs: Values, ys: Values) -> list[Point]:
        return [self.point(x, y) for x, y in zip(xs, ys, strict=True)]

    def draw(
        self,
        canvas: Canvas,
        x_ticks: dict[float, str],
        y_ticks: dict[float, str],
        x_title: str = "",
    ) -> None:
        """Lines at the ticks of y, ticks of x, and the title of x."""
        x0, x1 = self.x_range
        bottom = self.top + self.height
        for y, text in y_ticks.items():
            canvas.line(self.points([x0, x1], [y, y]), (222, 222, 222))
            canvas.text(self.left - 8, self.point(x0, y)[1], text, size=13, anchor="rm", color=GREY)
        for x, text in x_ticks.items():
            place = self.point(x, self.y_range[0])[0]
            canvas.line([(place, bottom), (place, bottom + 5)], GREY)
            canvas.text(place, bottom + 15, text, size=13, anchor="mm", color=GREY)
        canvas.line(
            [(self.left, self.top), (self.left, bottom), (self.left + self.width, bottom)], INK
        )
        canvas.text(self.left + self.width / 2, bottom + 36, x_title, size=14, anchor="mm")


def fitting(text: str, room: float, size: int) -> int:
    """The size of letters, at most `size` and at least 11, at which a text is within the room."""
    while size > 11 and text_width(text, size) > room:
        size -= 1
    return size
