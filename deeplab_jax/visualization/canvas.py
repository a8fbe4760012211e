"""A sheet to draw figures on: lines, boxes and letters, anti-aliased."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

INK, GREY, LIGHT = (40, 40, 40), (120, 120, 120), (222, 222, 222)
_PAPER = (255, 255, 255)
# Pillow draws hard edges, so all is drawn larger and scaled down.
_FINE = 3

Color = tuple[int, int, int]
Point = tuple[float, float]

# Okabe and Ito's colours, which the colour-blind can tell apart too.
ORANGE: Color = (230, 159, 0)
SKY: Color = (86, 180, 233)
GREEN: Color = (0, 158, 115)
YELLOW: Color = (240, 228, 66)
BLUE: Color = (0, 114, 178)
VERMILLION: Color = (213, 94, 0)
PURPLE: Color = (204, 121, 167)


class Canvas:
    """White, `width` by `height` pixels; all arguments are in these."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * _FINE, height * _FINE), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._pasted: list[tuple[np.ndarray, int, int]] = []

    def line(self, points: Sequence[Point], color: Color = INK, thickness: float = 1.0) -> None:
        fine = [(x * _FINE, y * _FINE) for x, y in points]
        self._draw.line(fine, color, max(1, round(thickness * _FINE)), joint="curve")

    def dashed(self, start: Point, end: Point, color: Color = GREY, dash: float = 5.0) -> None:
        (x0, y0), (x1, y1) = start, end
        count = max(1, round(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5 / (2 * dash)))
        for index in range(count):
            a, b = index / count, (index + 0.5) / count
            place = [(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in (a, b)]
            self.line(place, color)

    def arrow(self, start: Point, end: Point, color: Color = GREY) -> None:
        """To the right, with a head."""
        self.line([start, end], color, 1.2)
        x, y = end
        head = [(x, y), (x - 7, y - 4), (x - 7, y + 4)]
        self._draw.polygon([(a * _FINE, b * _FINE) for a, b in head], fill=color)

    def dot(self, x: float, y: float, radius: float, color: Color = INK) -> None:
        fine = [value * _FINE for value in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.ellipse(fine, fill=color)

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        *,
        fill: Color | None = None,
        outline: Color | None = INK,
        thickness: float = 1.0,
    ) -> None:
        fine = tuple(value * _FINE for value in (left, top, right, bottom))
        self._draw.rectangle(fine, fill, outline, max(1, round(thickness * _FINE)))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        anchor: str = "lm",
        color: Color = INK,
    ) -> None:
        """Letters at a point; the anchor is Pillow's: l, m, r across and a, m, s down."""
        self._draw.text((x * _FINE, y * _FINE), text, color, _font(size * _FINE), anchor=anchor)

    def paste(self, picture: UInt8[np.ndarray, "h w 3"], left: int, top: int) -> None:
        """A picture, pixel by pixel; it lies below what is drawn afterwards."""
        enlarged = Image.fromarray(picture).resize(
            (picture.shape[1] * _FINE, picture.shape[0] * _FINE), Image.Resampling.NEAREST
        )
        self._image.paste(enlarged, (left * _FINE, top * _FINE))

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        # A box's mean keeps pasted pixels as they are.
        return np.asarray(self._image.reduce(_FINE))


def text_width(text: str, size: int = 14) -> float:
    return _font(size).getlength(text)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow brings it along; its type also allows for a Pillow without FreeType.
    return ImageFont.load_default(size)  # type: ignore[return-value]
