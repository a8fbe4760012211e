"""Draws a contact sheet: images with their masks over them, to look through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from deeplab_jax.data.io.masks import MaskFormat
from deeplab_jax.data_check.scan import Scan, thumbnail
from deeplab_jax.visualization.overlays import blend, class_entries, image_grid, legend

_COLUMNS = 6
_WIDTH, _HEIGHT = 240, 320  # largest size of a tile, pixels
_MAX_TITLE = 34  # letters that fit above a tile


def draw(
    scans: Sequence[Scan], mask_format: MaskFormat, num_channels: int, limit: int = 36
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws up to `limit` pairs, evenly spread over all, above a legend of the classes they show.

    Pixels that belong to no class stay clear, as ignored ones do.
    """
    readable = [scan for scan in scans if scan.readable]
    chosen = np.unique(np.linspace(0, len(readable) - 1, min(limit, len(readable))).astype(int))
    tiles = []
    shown: set[int] = set()
    for scan in (readable[index] for index in chosen):
        image, label = thumbnail(scan, mask_format, num_channels, (_HEIGHT, _WIDTH))
        tiles.append((_title(scan), blend(image, label, mask_format.labels)))
        shown |= {int(i) for i in np.unique(label) if i < mask_format.labels.num_classes}
    sheet = image_grid(tiles, _COLUMNS, _WIDTH)
    entries = class_entries(sorted(shown), mask_format.labels)
    return np.concatenate([sheet, legend(entries, sheet.shape[1])])


def _title(scan: Scan) -> str:
    """The split and the end of the name, which tells names of one folder apart."""
    room = _MAX_TITLE - len(scan.split) - 1
    name = scan.pair.name
    return f"{scan.split} {name if len(name) <= room else '...' + name[3 - room :]}"
