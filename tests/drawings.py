"""Checks of figures: how far one is from the picture in docs, and whether its texts are legible."""

import itertools
from unittest import mock

import cv2
import numpy as np
from matplotlib.text import Text

from conftest import ROOT
from deeplab_jax.visualization import plots

CELL = 24  # pixels: a digit is about as large
BOUND = 8  # of 255: other versions of NumPy, JAX and OpenCV compute slightly other colours


def difference(path, name):
    """The largest mean absolute difference, 0..255, of a square of a file and docs' picture."""
    drawn, there = (
        cv2.imread(str(file), cv2.IMREAD_COLOR_RGB).astype(np.float32)
        for file in (path, ROOT / "docs" / "images" / f"{name}.png")
    )
    assert drawn.shape == there.shape
    return cv2.blur(np.abs(drawn - there).mean(2), (CELL, CELL)).max()


def texts(figure):
    """The texts of a figure, each legible: inside the figure and apart from the others."""
    drawn, draw = [], Text.draw

    def record(self, renderer, *args, **kwargs):
        draw(self, renderer, *args, **kwargs)
        if self.get_visible() and self.get_text().strip():
            drawn.append((self.get_text(), self.get_window_extent(renderer), self.get_fontsize()))

    with mock.patch.object(Text, "draw", record):
        plots.rasterize(figure)
    for words, box, size in drawn:
        assert box.x0 >= 0, words
        assert box.y0 >= 0, words
        assert box.x1 <= figure.bbox.x1, words
        assert box.y1 <= figure.bbox.y1, words
        assert size >= 6, words
    for (words, box, _), (others, other, _) in itertools.combinations(drawn, 2):
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(width, height) < 2, f"{words!r} and {others!r} overlap"
    return [words for words, _, _ in drawn]
