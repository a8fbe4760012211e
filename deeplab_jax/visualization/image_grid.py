"""Pictures in rows and columns with titles: predictions beside labels, contact sheets."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from deeplab_jax.data.labels import LabelSet
from deeplab_jax.visualization.overlays import (
    INK,
    Picture,
    blank,
    blend,
    class_entries,
    font,
    legend,
    shorten,
    to_rgb,
)

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
        pixels = blank(height, total_width)
        for column, (_, picture) in enumerate(row):
            x = GAP + column * (width + GAP)
            pixels[top : top + picture.shape[0], x : x + picture.shape[1]] = picture
        canvas = Image.fromarray(pixels)
        draw = ImageDraw.Draw(canvas)
        for column, (title, _) in enumerate(row):
            position = (GAP + column * (width + GAP), _TITLE / 2)
            draw.text(position, shorten(title, font(14), width), INK, font(14), anchor="lm")
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
