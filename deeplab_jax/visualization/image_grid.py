"""Pictures of labels and predictions."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8

from deeplab_jax.data.labels import IGNORE, LabelSet

Image = UInt8[np.ndarray, "h w 3"]
Ids = UInt8[np.ndarray, "h w"]

_GAP = 8  # pixels between panels
_LINE = 22  # height of a line of text, pixels
_INK, _PAPER, _GRID = (40, 40, 40), 255, (215, 215, 215)
_CELL_WITH_NUMBER = 34  # side of a cell of a confusion plot that a number fits into, pixels
_CAPTION_WIDTH = 460  # of a confusion plot, pixels


def to_rgb(image: UInt8[np.ndarray, "h w c"]) -> Image:
    """Any number of channels as RGB: one is repeated, of more than three the first three show."""
    if image.shape[2] < 3:
        return np.repeat(image[:, :, :1], 3, axis=2)
    return np.ascontiguousarray(image[:, :, :3])


def colorize(ids: Ids, labels: LabelSet) -> Image:
    """Each id in its class's colour; ignored pixels in white."""
    return labels.palette()[ids]


def overlay(
    image: UInt8[np.ndarray, "h w c"], ids: Ids, labels: LabelSet, opacity: float = 0.5
) -> Image:
    """Class colours laid over the image; class 0 and ignored pixels left clear.

    Class 0 is the ground in VOC; where it is a class like the others its colour is laid on too.

    Args:
      image: of any number of channels.
      ids: class of each pixel.
      labels: names and colours.
      opacity: of the colours, 0..1.
    """
    rgb = to_rgb(image)
    parts = round(256 * opacity)
    colors = colorize(ids, labels).astype(np.uint16)
    blend = np.right_shift(rgb.astype(np.uint16) * (256 - parts) + colors * parts, 8)
    clear = ids == IGNORE
    if labels.names[0] == "background":
        clear |= ids == 0
    return np.where(clear[..., None], rgb, blend.astype(np.uint8))


def prediction_grid(
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


def confusion_plot(matrix: np.ndarray, labels: LabelSet) -> Image:
    """Heat map of a confusion matrix: of each true class's pixels the share that each class got.

    Args:
      matrix: integers `[classes, classes]`, pixels by true (row) and predicted class (column).
      labels: names of the classes.

    Returns:
      A picture with the shares in percent where cells are large enough; none is written below
      0.05 %. A row whose class has no pixels is grey.
    """
    num_classes = len(labels.names)
    cell = int(np.clip(924 // num_classes, 14, 72))  # pixels
    names = [name[:24] for name in labels.names]
    margin = max(_text_width(name) for name in names) + 2 * _GAP
    side = num_classes * cell
    counts = np.asarray(matrix, np.float64)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)

    canvas = _blank(_LINE + margin + side + _GAP, max(margin + side + _GAP, _CAPTION_WIDTH))
    _write(canvas, "rows: true class; columns: predicted; % of the row's pixels", _GAP)
    top = _LINE + margin
    cells = np.repeat(np.repeat(_heat(shares), cell, 0), cell, 1)
    canvas[top : top + side, margin : margin + side] = cells
    for place in range(num_classes + 1):  # lines between cells
        offset = place * cell
        canvas[top + offset - (place > 0), margin : margin + side] = _GRID
        canvas[top : top + side, margin + offset - (place > 0)] = _GRID
    for place, name in enumerate(names):
        middle = place * cell + (cell - _LINE) // 2
        strip = _blank(_LINE, margin)
        _write(strip, name, margin - _GAP - _text_width(name))
        _paste(canvas, strip, top + middle, 0)
        strip = _blank(_LINE, margin)
        _write(strip, name, _GAP)
        _paste(canvas, np.rot90(strip), top - margin, margin + middle)
    if cell >= _CELL_WITH_NUMBER:
        for row, column in np.argwhere(shares >= 0.0005):
            center = (margin + column * cell + cell // 2, top + row * cell + cell // 2)
            _write_share(canvas, float(shares[row, column]), center, exact=cell >= 60)
    return canvas


def _heat(shares: np.ndarray) -> Image:
    """White to dark blue for 0 to 1, grey for NaN."""
    low, high = np.array([255, 255, 255]), np.array([8, 60, 130])
    color = low + (high - low) * np.nan_to_num(shares)[..., None]
    return np.where(np.isnan(shares)[..., None], 225, np.rint(color)).astype(np.uint8)


def _write_share(canvas: Image, share: float, center: tuple[int, int], *, exact: bool) -> None:
    text = f"{100 * share:.1f}" if exact or share < 0.095 else f"{100 * share:.0f}"
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.38, 1)
    ink = (255, 255, 255) if share > 0.5 else _INK
    place = (center[0] - width // 2, center[1] + height // 2)
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, ink, 1, cv2.LINE_AA)


def _paste(canvas: Image, picture: Image, top: int, left: int) -> None:
    """Lays a picture onto the canvas where it is darker, so that neighbours may overlap."""
    height, width = picture.shape[:2]
    place = canvas[top : top + height, left : left + width]
    np.minimum(place, picture[: place.shape[0], : place.shape[1]], out=place)
