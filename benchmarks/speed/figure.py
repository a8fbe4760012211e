"""Times of both sides as bars."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8

from deeplab_jax.visualization.canvas import BLUE, GREY, ORANGE, Canvas, Color

_WIDTH, _LEFT, _RIGHT = 960, 300, 170  # pixels
_BAR, _STEP, _CASE = 16, 24, 50
_OURS, _BEST = BLUE, ORANGE
_THEIRS: Color = (200, 200, 200)


def speed_figure(result: dict[str, Any]) -> UInt8[np.ndarray, "h w 3"]:
    """A block a case: this package, and torchvision in each of its modes, the best one marked.

    Args:
      result: what `python -m benchmarks.speed --json` writes.
    """
    rows = result["rows"]
    bars = [len(row["theirs_by_mode"]) + 1 for row in rows]
    canvas = Canvas(_WIDTH, 50 + sum(_CASE + _STEP * count for count in bars) + 16)
    title = f"{result['device']}: medians; shorter is faster, a ratio above 1 too"
    canvas.text(16, 24, title, size=17)
    y = 50.0
    for row in rows:
        canvas.text(16, y + 18, row["name"], size=15)
        y = _case(canvas, row, y + 36) + _CASE - 36
    return canvas.picture()


def _case(canvas: Canvas, row: dict[str, Any], y: float) -> float:
    """Bars below y; where they end."""
    theirs = row["theirs_by_mode"]
    longest = max([row["ours_seconds"], *theirs.values()])
    best = min(theirs, key=theirs.get, default=None)
    lines = [("deeplab_jax", row["ours_seconds"], _OURS, "")]
    for mode, seconds in theirs.items():
        color, remark = (_BEST, f"   ratio {row['ratio']:.2f}") if mode == best else (_THEIRS, "")
        lines.append((f"torchvision, {mode}", seconds, color, remark))
    for name, seconds, color, remark in lines:
        middle = y + _STEP / 2
        right = _LEFT + seconds / longest * (_WIDTH - _LEFT - _RIGHT)
        canvas.text(_LEFT - 10, middle, name, size=13, anchor="rm")
        canvas.box(_LEFT, middle - _BAR / 2, right, middle + _BAR / 2, fill=color, outline=None)
        canvas.text(right + 8, middle, _spell(seconds) + remark, size=13, color=GREY)
        y += _STEP
    return y


def _spell(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 0.5 else f"{seconds:.2f} s"
