"""A picture of many pairs: each image with its mask laid over it, to be looked through."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data_check.scan import Scan, thumbnail
from deeplab_jax.visualization import image_grid as visualize

_COLUMNS = 6
_WIDTH, _HEIGHT = 240, 320  # of a tile, at most, pixels
_GAP = 8
_LINE = 18  # height of a tile's title
_MAX_TITLE = 34  # letters that fit above a tile


def draw(
    scans: Sequence[Scan], mask_format: MaskFormat, num_channels: int, limit: int = 36
) -> UInt8[np.ndarray, "h w 3"]:
    """Up to `limit` pairs, evenly spread over all, with the names of the classes they show.

    What is of no class is shown as what is ignored is: clear.
    """
    readable = [scan for scan in scans if scan.readable]
    places = np.unique(np.linspace(0, len(readable) - 1, min(limit, len(readable))).astype(int))
    tiles = []
    shown: set[int] = set()
    for scan in (readable[place] for place in places):
        image, label = thumbnail(scan, mask_format, num_channels, (_HEIGHT, _WIDTH))
        tiles.append(_tile(_title(scan), image, label, mask_format))
        shown |= {int(i) for i in np.unique(label) if i < mask_format.labels.num_classes}
    rows = [_row(tiles[first : first + _COLUMNS]) for first in range(0, len(tiles), _COLUMNS)]
    width = _COLUMNS * (_WIDTH + _GAP) + _GAP
    return np.concatenate([*rows, visualize.legend(sorted(shown), mask_format.labels, width)])


def _title(scan: Scan) -> str:
    room = _MAX_TITLE - len(scan.split) - 1
    name = scan.pair.name
    return f"{scan.split} {name if len(name) <= room else '...' + name[3 - room :]}"


def _tile(
    title: str, image: np.ndarray, label: np.ndarray, mask_format: MaskFormat
) -> UInt8[np.ndarray, "h w 3"]:
    tile = np.full((_LINE + image.shape[0], _WIDTH, 3), 255, np.uint8)
    ascii_text = title.encode("ascii", "replace").decode()  # all that OpenCV's fonts hold
    cv2.putText(
        tile, ascii_text, (0, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (40, 40, 40), 1, cv2.LINE_AA
    )
    tile[_LINE:, : image.shape[1]] = visualize.overlay(image, label, mask_format.labels)
    return tile


def _row(tiles: Sequence[np.ndarray]) -> UInt8[np.ndarray, "h w 3"]:
    height = max(tile.shape[0] for tile in tiles) + _GAP
    row = np.full((height, _COLUMNS * (_WIDTH + _GAP) + _GAP, 3), 255, np.uint8)
    for column, tile in enumerate(tiles):
        x = _GAP + column * (_WIDTH + _GAP)
        row[: tile.shape[0], x : x + _WIDTH] = tile
    return row
