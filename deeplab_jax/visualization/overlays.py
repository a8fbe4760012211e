"""Pictures of one prediction: the classes laid over the image, where a class lights up.

A picture is legible at any size of image: small images are enlarged by whole pixels, and letters
grow with large ones.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
from jaxtyping import Float, Int, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from deeplab_jax.data.labels import LabelSet
from deeplab_jax.visualization import image_grid as visualize

Picture = UInt8[np.ndarray, "_ _ 3"]

_MIN_SIDE = 320  # pixels: an image is enlarged until a side has as many, unless it is a thin strip
_MAX_ENLARGED = 1280  # pixels of the longer side, to which it may be enlarged
_INK, _PAPER = (40, 40, 40), 255
_HEAT = 0.7  # share of the colour map's colour in a heat map; the rest is the grey image


def class_counts(
    ids: Integer[np.ndarray, "h w"], num_classes: int
) -> Int[np.ndarray, " num_classes"]:
    """Pixels of each class."""
    return np.bincount(np.ravel(ids), minlength=num_classes)[:num_classes]


def overlay(
    image: UInt8[np.ndarray, "h w c"],
    ids: UInt8[np.ndarray, "h w"],
    labels: LabelSet,
    *,
    opacity: float = 0.5,
) -> Picture:
    """Class colours laid over the image, above a legend of the classes that occur.

    Args:
      image: of any number of channels.
      ids: class of each pixel.
      labels: names and colours.
      opacity: of the colours, 0..1. A class 0 named "background" is left clear.
    """
    panel = visualize.overlay(image, ids, labels, opacity)
    return _above(_enlarged(panel), functools.partial(legend, ids, labels))


def side_by_side(
    image: UInt8[np.ndarray, "h w c"],
    ids: UInt8[np.ndarray, "h w"],
    labels: LabelSet,
    *,
    opacity: float = 0.5,
) -> Picture:
    """The image beside its overlay, above the legend; arguments as of `overlay`."""
    panels = [visualize.to_rgb(image), visualize.overlay(image, ids, labels, opacity)]
    left, right = map(_enlarged, panels)
    gap = _blank(left.shape[0], _unit(left) // 2)
    both = np.concatenate([left, gap, right], axis=1)
    return _above(both, functools.partial(legend, ids, labels), unit=_unit(left))


def heatmap(
    image: UInt8[np.ndarray, "h w c"], probability: Float[np.ndarray, "h w"], name: str
) -> Picture:
    """Where a class lights up: its probability in colour over the grey image, above a scale.

    The colours are viridis, whose steps look even and whose lightness alone tells the order.

    Args:
      image: of any number of channels.
      probability: of the class, 0..1.
      name: of the class.
    """
    grey = cv2.cvtColor(visualize.to_rgb(image), cv2.COLOR_RGB2GRAY)
    panel = _heat(probability, grey)
    return _above(_enlarged(panel), functools.partial(_scale_bar, name))


def legend(
    ids: UInt8[np.ndarray, "h w"], labels: LabelSet, width: int, unit: int
) -> UInt8[np.ndarray, "rows width 3"]:
    """Colour, name and share of each class that occurs, the largest first.

    Args:
      ids: class of each pixel.
      labels: names and colours.
      width: of the legend, pixels.
      unit: height of letters, pixels.
    """
    counts = class_counts(ids, labels.num_classes)
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    font = _font(unit)
    clear = (
        [0] if labels.names[0] == "background" else []
    )  # as `visualization.image_grid.overlay` leaves it
    swatch, gap, line = unit, unit // 2, round(1.6 * unit)
    entries: list[tuple[int, int, int, str]] = []  # x, row, class, text
    x, row = gap, 0
    for index in order:
        area = f" {share(int(counts[index]), ids.size)}"
        room = width - swatch - 3 * gap - font.getlength(area)
        text = _fit(labels.names[index], font, room) + area
        length = swatch + gap + round(font.getlength(text))
        if x + length + gap > width and x > gap:
            x, row = gap, row + 1
        entries.append((x, row, index, text))
        x += length + 2 * gap
    canvas = Image.fromarray(_blank((row + 1) * line + gap, width))
    draw = ImageDraw.Draw(canvas)
    for x, row, index, text in entries:
        top = row * line + gap
        draw.rectangle(
            (x, top, x + swatch - 1, top + swatch - 1),
            fill=None if index in clear else labels.colors[index],
            outline=_INK,
            width=max(1, unit // 16),
        )
        draw.text((x + swatch + gap, top + swatch / 2), text, _INK, font, anchor="lm")
    return np.asarray(canvas)


def share(pixels: int, total: int) -> str:
    """A share in percent, of which what is there never reads as 0."""
    percent = 100 * pixels / total
    return "< 0.1 %" if 0 < percent < 0.1 else f"{percent:.1f} %"


def _scale_bar(name: str, width: int, unit: int) -> Picture:
    """The colours of 0 to 1, with a title."""
    font = _font(unit)
    gap, line = unit // 2, round(1.6 * unit)
    bar_width = min(width - 2 * gap, 16 * unit)
    bar = _heat(np.linspace(0, 1, bar_width)[None], np.full((1, bar_width), 128, np.uint8))
    canvas = _blank(2 * gap + 3 * line, width)
    top = gap + line
    canvas[top : top + unit, gap : gap + bar_width] = bar
    drawn = Image.fromarray(canvas)
    draw = ImageDraw.Draw(drawn)
    title = _fit(f"probability of {name}", font, width - 2 * gap)
    draw.text((gap, gap + line / 2), title, _INK, font, anchor="lm")
    bottom = top + unit + line / 2
    for place, text, anchor in ((0, "0", "lm"), (0.5, "0.5", "mm"), (1, "1", "rm")):
        draw.text((gap + place * bar_width, bottom), text, _INK, font, anchor=anchor)
    return np.asarray(drawn)


def _heat(probability: Float[np.ndarray, "h w"], grey: UInt8[np.ndarray, "h w"]) -> Picture:
    index = np.rint(np.clip(probability, 0, 1) * 255).astype(np.uint8)
    colors = cv2.cvtColor(cv2.applyColorMap(index, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(colors, _HEAT, visualize.to_rgb(grey[:, :, None]), 1 - _HEAT, 0)


def _above(panel: Picture, caption: functools.partial, unit: int | None = None) -> Picture:
    """A panel with a caption below it, which is `caption(width, unit)`."""
    unit = unit or _unit(panel)
    width = max(panel.shape[1], _MIN_SIDE, 16 * unit)
    below = caption(width, unit)
    room = _blank(panel.shape[0], width)
    room[:, : panel.shape[1]] = panel
    return np.concatenate([room, below])


def _enlarged(panel: Picture) -> Picture:
    height, width = panel.shape[:2]
    factor = min(-(-_MIN_SIDE // min(height, width)), _MAX_ENLARGED // max(height, width))
    if factor <= 1:
        return panel
    return np.repeat(np.repeat(panel, factor, axis=0), factor, axis=1)


def _unit(panel: Picture) -> int:
    """Height of letters: legible on a screen that shows the picture whole."""
    return max(14, round(max(panel.shape[:2]) / 45))


def _fit(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."


def _blank(height: int, width: int) -> Picture:
    return np.full((height, width, 3), _PAPER, np.uint8)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow brings it along; its type also allows for a Pillow without FreeType.
    return ImageFont.load_default(size)  # type: ignore[return-value]
