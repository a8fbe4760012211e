"""The pictures in docs, and how far one drawn again is from them."""

import cv2
import numpy as np

from conftest import ROOT

CELL = 12  # pixels: a digit is about as large
BOUND = 8  # of 255: other versions of Pillow and OpenCV draw edges a little otherwise


def difference(first, second):
    """The largest mean absolute difference of a square of the picture, 0..255."""
    assert first.shape == second.shape
    by_pixel = np.abs(first.astype(np.float32) - second).mean(2)
    return cv2.blur(by_pixel, (CELL, CELL)).max()


def committed(name):
    return cv2.imread(str(ROOT / "docs" / "images" / f"{name}.png"), cv2.IMREAD_COLOR_RGB)
