"""Pictures of labels and predictions."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8

from deeplab_jax.labels import IGNORE, LabelSet

Image = UInt8[np.ndarray, "h w 3"]
Ids = UInt8[np.ndarray, "h w"]

_GAP = 8  # pixels between panels
_LINE = 22  # height of a line of text, pixels
_INK, _PAPER = (40, 40, 40), 255


def to_rgb(image: UInt8[np.ndarray, "h w c"]) -> Image:
    """Any number of channels as RGB: one is repeated, of more than three the first three show."""
    if image.shape[2] < 3:
        return np.repeat(image[:, :, :1], 3, axis=2)
    return np.ascontiguousarray(image[:, :, :3])


def colorize(ids: Ids, labels: LabelSet) -> Image:
    """Each id in its class's colour; ignored pixels in white."""
    return labels.palette()[ids]


def overlay(image: UInt8[np.ndarray, "h w c"], ids: Ids, labels: LabelSet) -> Image:
    """Class colours laid over the image at half strength; class 0 and ignored pixels left clear.

    Class 0 is the ground in VOC; where it is a class like the others its colour is laid on too.
    """
    rgb = to_rgb(image)
    blend = (rgb.astype(np.uint16) + colorize(ids, labels)) // 2
    clear = ids == IGNORE
    if labels.names[0] == "background":
        clear |= ids == 0
    return np.where(clear[..., None], rgb, blend.astype(np.uint8))


def prediction_sheet(
    rows: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    labels: LabelSet,
    width: int = 240,
) -> Image:
    """A picture with one line an image: the image, its labels, the prediction laid over it.

    Args:
      rows: (name, image uint8 `[h, w, c]`, labels uint8 `[h, w]`, ids uint8 `[h, w]`).
      labels: names and colours.
      width: of each panel, pixels; heights follow.
    """
    sheet_width = 3 * width + 4 * _GAP
    lines = [_header(("image", "label", "prediction"), width, sheet_width)]
    shown: set[int] = set()
    for name, image, truth, ids in rows:
        panels = [to_rgb(image), overlay(image, truth, labels), overlay(image, ids, labels)]
        lines += [_text_line(name, sheet_width), _panels(panels, width, sheet_width)]
        shown |= {int(i) for i in np.union1d(truth, ids) if i < labels.num_classes}
    lines.append(legend(sorted(shown), labels, sheet_width))
    return np.concatenate(lines)


def legend(ids: list[int], labels: LabelSet, width: int) -> Image:
    """The names of classes beside their colours, broken into lines of a given width."""
    lines, line, x = [], _blank(_LINE, width), _GAP
    for index in ids:
        length = _text_width(labels.names[index]) + 34
        if x + length > width and x > _GAP:
            lines.append(line)
            line, x = _blank(_LINE, width), _GAP
        color = tuple(int(c) for c in labels.colors[index])
        cv2.rectangle(line, (x, 5), (x + 14, 17), color, -1)
        cv2.rectangle(line, (x, 5), (x + 14, 17), _INK, 1)
        _write(line, labels.names[index], x + 19)
        x += length
    return np.concatenate([*lines, line, _blank(_GAP, width)])


def _panels(panels: list[Image], width: int, sheet_width: int) -> Image:
    height = max(1, round(width * panels[0].shape[0] / panels[0].shape[1]))
    line = _blank(height + _GAP, sheet_width)
    for column, panel in enumerate(panels):
        # Enlarged by whole pixels, so that what the network saw can be seen.
        method = cv2.INTER_AREA if panel.shape[1] > width else cv2.INTER_NEAREST
        x = _GAP + column * (width + _GAP)
        line[:height, x : x + width] = cv2.resize(panel, (width, height), interpolation=method)
    return line


def _header(titles: tuple[str, ...], width: int, sheet_width: int) -> Image:
    line = _blank(_LINE, sheet_width)
    for column, title in enumerate(titles):
        _write(line, title, _GAP + column * (width + _GAP))
    return line


def _text_line(text: str, width: int) -> Image:
    line = _blank(_LINE, width)
    _write(line, text, _GAP)
    return line


def _blank(height: int, width: int) -> Image:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _write(canvas: Image, text: str, x: int) -> None:
    # OpenCV's fonts hold ASCII alone.
    ascii_text = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, ascii_text, (x, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, _INK, 1, cv2.LINE_AA)


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0]
