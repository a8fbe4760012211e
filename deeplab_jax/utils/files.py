"""Writing files, so that none is ever seen half-written under its name."""

from __future__ import annotations

import os
import pathlib

import cv2
import numpy as np
from jaxtyping import UInt8


def write_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an RGB picture aside and renames it."""
    # Half the size that OpenCV's own choice gives, in twice its time: 40 ms for a million pixels.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 3]
    encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1]
    write_bytes(path, encoded.tobytes())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file aside and renames it."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(content)
    os.replace(aside, path)
