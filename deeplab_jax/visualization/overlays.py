"""Pictures of predictions: class colours over images, probabilities of a class, and grids of them.

They are legible at any size of image: small images are enlarged by whole pixels, and the font
grows with large ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from deeplab_jax.data.labels import IGNORE, LabelSet, class_counts, is_background

Picture = UInt8[np.ndarray, "_ _ 3"]
Color = tuple[int, int, int]

INK: Color = (40, 40, 40)
_MIN_SIDE = 320  # pixels; an image is enlarged until its shorter side has as many,
_MAX_ENLARGED = 1280  # pixels; but its longer side no more than these
_HEAT = 0.7  # opacity of the colour map over the grey image


def percentage(pixels: int, total: int) -> str:
    """Formats a fraction in percent; one above 0 never reads as 0."""
    percent = 100 * pixels / total
    return "< 0.1 %" if 0 < percent < 0.1 else f"{percent:.1f} %"


def to_rgb(image: UInt8[np.ndarray, "h w c"]) -> Picture:
    """Shows any number of channels as RGB: the first three, or the first one as grey."""
    if image.shape[2] < 3:
        return np.repeat(image[:, :, :1], 3, axis=2)
    return np.ascontiguousarray(image[:, :, :3])


def colorize(ids: UInt8[np.ndarray, "h w"], labels: LabelSet) -> Picture:
    """Shows each id in its class's colour, and ignored pixels in white."""
    return cv2.LUT(cv2.merge([ids] * 3), labels.palette()[None])


def blend(
    image: UInt8[np.ndarray, "h w c"],
    ids: UInt8[np.ndarray, "h w"],
    labels: LabelSet,
    opacity: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """Blends class colours of an opacity, 0..1, over an image of any number of channels.

    Ignored pixels stay clear, and so does class 0 if its name means background.
    """
    rgb = to_rgb(image)
    weight = round(256 * opacity) / 256
    # Rounds down: the exact sums are multiples of 1/256, and OpenCV rounds to the nearest integer.
    blended = cv2.addWeighted(rgb, 1 - weight, colorize(ids, labels), weight, 1 / 512 - 1 / 2)
    clear = np.zeros(256, np.uint8)
    clear[IGNORE], clear[0] = 1, _is_clear(0, labels)
    return cv2.copyTo(rgb, cv2.LUT(ids, clear), blended)


def overlay(
    image: UInt8[np.ndarray, "h w c"],
    ids: UInt8[np.ndarray, "h w"],
    labels: LabelSet,
    *,
    opacity: float = 0.5,
    num_rows: int | None = None,
    unsure: Bool[np.ndarray, "h w"] | None = None,
    beside_image: bool = False,
) -> Picture:
    """Draws `blend`, perhaps beside the image, above a legend of the classes that occur.

    The legend has `num_rows` lines, see `legend`; the pixels of `unsure` are hatched.
    """
    panel = _hatched(_enlarged(blend(image, ids, labels, opacity)), unsure)
    size = _font_size(panel)
    if beside_image:
        gap = blank(panel.shape[0], size // 2)
        panel = np.concatenate([_enlarged(to_rgb(image)), gap, panel], axis=1)
    draw = functools.partial(legend, _area_entries(ids, labels, unsure), num_rows=num_rows)
    return _captioned(panel, draw, size)


def side_by_side(
    image: UInt8[np.ndarray, "h w c"],
    ids: UInt8[np.ndarray, "h w"],
    labels: LabelSet,
    *,
    opacity: float = 0.5,
    unsure: Bool[np.ndarray, "h w"] | None = None,
) -> Picture:
    """Draws the image, `overlay` on its right, and the legend below; arguments as there."""
    return overlay(image, ids, labels, opacity=opacity, unsure=unsure, beside_image=True)


def heatmap(
    image: UInt8[np.ndarray, "h w c"], probability: Float[np.ndarray, "h w"], name: str
) -> Picture:
    """Draws the probability of a class, 0..1, in colour over the grey image, above a colour scale.

    The colours are viridis, whose steps look even and whose lightness grows with the value.
    """
    grey = cv2.cvtColor(to_rgb(image), cv2.COLOR_RGB2GRAY)
    panel = _enlarged(_heat(probability, grey))
    return _captioned(panel, functools.partial(_scale_bar, name), _font_size(panel))


# --- Legends -----------------------------------------------------------------------------------

# Colour (None: an empty swatch), name, and a note behind the name.
Entry = tuple[Color | Literal["hatched"] | None, str, str]


def class_entries(ids: Iterable[int], labels: LabelSet) -> list[Entry]:
    """Makes the legend's entries of classes; the swatch of a class that stays clear is empty."""
    return [
        (None if _is_clear(index, labels) else labels.colors[index], labels.names[index], "")
        for index in ids
    ]


def legend(
    entries: Sequence[Entry], width: int, font_size: int = 14, num_rows: int | None = None
) -> UInt8[np.ndarray, "rows width 3"]:
    """Draws swatches with names and notes, broken into lines; long names are cut.

    Args:
      entries: to draw, in this order.
      width, font_size: pixels.
      num_rows: number of lines; entries that need more are left out. None: as many as they need.
    """
    letters = font(font_size)
    swatch, gap, line = font_size, font_size // 2, round(1.6 * font_size)
    placed: list[tuple[int, int, Entry]] = []  # x, row
    x, row = gap, 0
    for color, name, note in entries:
        note = f" {note}" if note else ""
        name = shorten(name, letters, width - swatch - 3 * gap - _length(letters, note))
        length = swatch + gap + round(_length(letters, name + note))
        if x + length + gap > width and x > gap:
            x, row = gap, row + 1
        placed.append((x, row, (color, name, note)))
        x += length + 2 * gap
    if num_rows is not None:
        placed, row = [one for one in placed if one[1] < num_rows], num_rows - 1
    pixels = blank((row + 1) * line + gap, width)
    frame = max(1, font_size // 16)
    for x, row, (color, name, note) in placed:
        top = row * line + gap
        pixels[top : top + swatch, x : x + swatch] = INK
        inside = slice(top + frame, top + swatch - frame), slice(x + frame, x + swatch - frame)
        pixels[inside] = color if isinstance(color, tuple) else (255, 255, 255)
        if color == "hatched":
            pixels[inside] = _hatched(pixels[inside], np.full(pixels[inside].shape[:2], True))
        left = x + swatch + gap
        for words, start in ((name, 0.0), (note, _length(letters, name))):
            draw = _draw_text if font_size < 32 else _draw_text.__wrapped__  # else gigabytes
            drawn = draw(words, font_size, start % 1)
            first = left + int(start) - font_size
            part = pixels[top : top + line, max(first, 0) : first + drawn.shape[1]]
            np.minimum(part, drawn[: len(part), max(-first, 0) :][:, : part.shape[1]], out=part)
    return pixels


# Drawing text takes Python's lock, for longer than all other work on a picture. Names and areas
# repeat from picture to picture.
@functools.lru_cache(4096)
def _draw_text(words: str, font_size: int, start: float) -> Picture:
    """Draws a line of text, `font_size + start` pixels from the left; its middle is that of ink."""
    letters, line = font(font_size), round(1.6 * font_size)
    canvas = Image.fromarray(blank(line, math.ceil(letters.getlength(words)) + 2 * font_size))
    where = font_size + start, font_size / 2
    ImageDraw.Draw(canvas).text(where, words, INK, letters, anchor="lm")
    return np.asarray(canvas)


def _is_clear(index: int, labels: LabelSet) -> bool:
    return index == 0 and is_background(labels.names[0])


def _area_entries(
    ids: UInt8[np.ndarray, "h w"], labels: LabelSet, unsure: Bool[np.ndarray, "h w"] | None = None
) -> list[Entry]:
    """The classes that occur with their area in percent, the largest first; then what is unsure."""
    counts = class_counts(ids, labels.num_classes)
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    entries: list[Entry] = [
        (color, name, percentage(int(counts[index]), ids.size))
        for index, (color, name, _) in zip(order, class_entries(order, labels), strict=True)
    ]
    if unsure is not None:
        entries.append(("hatched", "unsure", percentage(int(unsure.sum()), ids.size)))
    return entries


def _scale_bar(name: str, width: int, font_size: int) -> Picture:
    """The colours of probabilities 0 to 1 with a title."""
    letters = font(font_size)
    gap, line = font_size // 2, round(1.6 * font_size)
    bar_width = min(width - 2 * gap, 16 * font_size)
    bar = _heat(np.linspace(0, 1, bar_width)[None], np.full((1, bar_width), 128, np.uint8))
    pixels = blank(2 * gap + 3 * line, width)
    top = gap + line
    pixels[top : top + font_size, gap : gap + bar_width] = bar
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    title = shorten(f"probability of {name}", letters, width - 2 * gap)
    draw.text((gap, gap + line / 2), title, INK, letters, anchor="lm")
    for value, anchor in ((0, "lm"), (0.5, "mm"), (1, "rm")):
        position = (gap + value * bar_width, top + font_size + line / 2)
        draw.text(position, f"{value:g}", INK, letters, anchor=anchor)
    return np.asarray(canvas)


def _heat(probability: Float[np.ndarray, "h w"], grey: UInt8[np.ndarray, "h w"]) -> Picture:
    index = np.rint(np.clip(probability, 0, 1) * 255).astype(np.uint8)
    colors = cv2.cvtColor(cv2.applyColorMap(index, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(colors, _HEAT, to_rgb(grey[:, :, None]), 1 - _HEAT, 0)


# --- Layout ------------------------------------------------------------------------------------


def blank(height: int, width: int) -> Picture:
    """White pixels."""
    return np.full((height, width, 3), 255, np.uint8)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow, at a size in pixels."""
    # Its type also allows for a Pillow without FreeType.
    return ImageFont.load_default(size)  # type: ignore[return-value]


@functools.lru_cache(4096)
def _length(letters: ImageFont.FreeTypeFont, words: str) -> float:
    return letters.getlength(words)


def shorten(words: str, letters: ImageFont.FreeTypeFont, max_width: float) -> str:
    """Cuts text to a width in pixels; "..." marks the cut."""
    if _length(letters, words) <= max_width:
        return words
    while words and _length(letters, words + "...") > max_width:
        words = words[:-1]
    return words + "..."


def _captioned(
    panel: Picture, draw_caption: Callable[[int, int], Picture], font_size: int
) -> Picture:
    """Draws a panel above `draw_caption(width, font_size)`."""
    width = max(panel.shape[1], _MIN_SIDE, 16 * font_size)
    padded = blank(panel.shape[0], width)
    padded[:, : panel.shape[1]] = panel
    return np.concatenate([padded, draw_caption(width, font_size)])


def _hatched(panel: Picture, unsure: Bool[np.ndarray, "_ _"] | None) -> Picture:
    """Draws diagonal lines over the unsure pixels, white beside dark: they show on any colour.

    `unsure` is as large as the panel was before it was enlarged; None: no pixels.
    """
    if unsure is None:
        return panel
    height, width = panel.shape[:2]
    line = max(1, round(max(height, width) / 500))
    phase = np.add.outer(np.arange(height, dtype=np.int32), np.arange(width, dtype=np.int32))
    phase = phase % (7 * line) // line
    mask = unsure.repeat(height // len(unsure), axis=0).repeat(width // unsure.shape[1], axis=1)
    result = panel.copy()
    result[mask & (phase == 0)] = 255
    result[mask & (phase == 1)] = INK
    return result


def _enlarged(panel: Picture) -> Picture:
    height, width = panel.shape[:2]
    factor = min(-(-_MIN_SIDE // min(height, width)), _MAX_ENLARGED // max(height, width))
    if factor <= 1:
        return panel
    return panel.repeat(factor, axis=0).repeat(factor, axis=1)


def _font_size(panel: Picture) -> int:
    """Pixels: legible on a screen that shows the whole picture."""
    return max(14, round(max(panel.shape[:2]) / 45))


# --- Grids of pictures -------------------------------------------------------------------------

GAP = 8  # pixels between columns
_TITLE = 22  # height of a title, pixels


def image_grid(tiles: Sequence[tuple[str, Picture]], num_columns: int, width: int) -> Picture:
    """Draws pictures in rows, each below its title; a row without titles has no line for them.

    Args:
      tiles: (title, picture of at most `width` pixels across), row by row.
      num_columns: pictures in a row.
      width: of a column, pixels; `GAP` pixels are between and beside columns.
    """
    total_width = num_columns * (width + GAP) + GAP
    rows = [blank(0, total_width)]
    for first in range(0, len(tiles), num_columns):
        row = tiles[first : first + num_columns]
        top = _TITLE if any(title for title, _ in row) else 0
        height = top + max(picture.shape[0] for _, picture in row) + GAP
        canvas = Image.fromarray(blank(height, total_width))
        draw = ImageDraw.Draw(canvas)
        for column, (title, picture) in enumerate(row):
            x = GAP + column * (width + GAP)
            canvas.paste(Image.fromarray(picture), (x, top))
            words = shorten(title, font(14), width)
            draw.text((x, _TITLE / 2), words, INK, font(14), anchor="lm")
        rows.append(np.asarray(canvas))
    return np.concatenate(rows)


def prediction_grid(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    labels: LabelSet,
    width: int = 240,
) -> Picture:
    """Draws a row per image: the image, its labels over it, the prediction over it; and a legend.

    Args:
      rows: (name, image uint8 `[h, w, c]`, labels uint8 `[h, w]`, ids uint8 `[h, w]`).
      labels: names and colours.
      width: of each panel, pixels; heights follow.
    """
    tiles: list[tuple[str, Picture]] = []
    shown: set[int] = set()
    for name, image, truth, ids in rows:
        panels = (to_rgb(image), blend(image, truth, labels), blend(image, ids, labels))
        titles = (name, "label", "prediction")
        tiles += zip(titles, (resized(panel, width) for panel in panels), strict=True)
        shown |= {int(i) for i in np.union1d(truth, ids) if i < labels.num_classes}
    grid = image_grid(tiles, 3, width)
    return np.concatenate([grid, legend(class_entries(sorted(shown), labels), grid.shape[1])])


def resized(panel: Picture, width: int) -> Picture:
    """Resizes a picture to a width in pixels; its height follows."""
    height = max(1, round(width * panel.shape[0] / panel.shape[1]))
    # Small images are enlarged by repeated pixels, so that what the network saw can be seen.
    method = cv2.INTER_AREA if panel.shape[1] > width else cv2.INTER_NEAREST
    return cv2.resize(panel, (width, height), interpolation=method)
