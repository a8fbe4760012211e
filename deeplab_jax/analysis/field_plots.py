"""The effective receptive field as a picture: what the logits at the centre depend on."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from deeplab_jax.analysis.receptive_field import SHARE, EffectiveField
from deeplab_jax.visualization.canvas import GREY, Canvas, Color, text_width

Picture = UInt8[np.ndarray, "h w 3"]

_PANEL = 440  # pixels of a panel's longer side, near which small images are enlarged
_GAP, _TOP, _BELOW, _BAR = 24, 84, 70, 14  # pixels
_FRAME: Color = (255, 255, 255)


def field_figure(fields: Sequence[tuple[str, EffectiveField]], title: str) -> Picture:
    """Panels side by side, on a square root scale from 0 to each panel's largest value.

    The frame in a panel is the least square around the centre that holds `SHARE` of the energy.

    Args:
      fields: (name, field), all of images of one size.
      title: above them.
    """
    rows, columns = fields[0][1].energy.shape
    factor = max(1, round(_PANEL / max(rows, columns)))
    width, height = columns * factor, rows * factor
    texts = [text for name, field in fields for text in (name, *facts(field))]
    width_of_one = round(max(width, *(text_width(text, 15) for text in texts))) + _GAP
    canvas = Canvas(_GAP + max(2, len(fields)) * width_of_one, _TOP + height + _BELOW + 60)
    canvas.text(_GAP, 24, title, size=18)
    for place, (name, field) in enumerate(fields):
        left = _GAP + place * width_of_one
        canvas.text(left, _TOP - 18, name, size=15)
        colors = cv2.resize(_colors(field.energy), (width, height), interpolation=cv2.INTER_NEAREST)
        canvas.paste(colors, left, _TOP)
        _frame(canvas, field, (left, _TOP), factor)
        for line, text in enumerate(facts(field)):
            canvas.text(left, _TOP + height + 18 + 20 * line, text, size=13, color=GREY)
    _scale(canvas, _TOP + height + _BELOW)
    return canvas.picture()


def facts(field: EffectiveField) -> tuple[str, str]:
    """Two lines of numbers."""
    return (
        f"{100 * SHARE:g} % of the energy within {field.side()} px, half of it within "
        f"{field.side(0.5)} px",
        f"theoretical field of view {field.theoretical} px, and the whole image by pooling",
    )


def _colors(energy: Float[np.ndarray, "h w"]) -> Picture:
    share = np.sqrt(energy / energy.max())
    index = np.rint(255 * share).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(index, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _frame(canvas: Canvas, field: EffectiveField, place: tuple[int, int], factor: int) -> None:
    """The square of `field.side()`, cut at the image."""
    half = field.side() // 2
    (top, bottom), (left, right) = (
        (max(0, centre - half) * factor, min(size, centre + half + 1) * factor)
        for centre, size in zip(field.centre, field.energy.shape, strict=True)
    )
    x, y = place
    canvas.box(x + left, y + top, x + right - 1, y + bottom - 1, outline=_FRAME, thickness=1.5)


def _scale(canvas: Canvas, top: int) -> None:
    width = 320
    values = np.tile((np.arange(width) / (width - 1)) ** 2, (_BAR, 1))
    canvas.paste(_colors(values), _GAP, top)
    for share in (0, 0.01, 0.1, 0.25, 0.5, 1):
        x = _GAP + (width - 1) * share**0.5
        canvas.line([(x, top + _BAR), (x, top + _BAR + 4)], GREY)
        canvas.text(x, top + _BAR + 13, f"{share:g}", size=12, anchor="mm", color=GREY)
    text = "mean absolute gradient of the logits at the centre, over the panel's largest value"
    canvas.text(_GAP + width + 16, top + _BAR / 2, text, size=13)
