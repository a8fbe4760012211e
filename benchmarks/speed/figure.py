"""Draws the times of both packages as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OTHER = "#c4c4c4"
_MARGIN, _BAR, _VALUE = 20, 22, 84  # a margin, the pitch of bars, and the width of a time


def speed_figure(result: dict[str, Any]) -> Figure:
    """Draws a group of bars per case: this package, and torchvision in each of its modes.

    Args:
      result: the parsed file that `python -m benchmarks.speed --json` writes.
    """
    rows = result["rows"]
    num_columns = 1 if len(rows) <= 2 else 2
    pitch = 58 + _BAR * max(len(row["theirs_by_mode"]) + 1 for row in rows)
    width = (plots.WIDTH - _MARGIN * (num_columns + 1)) / num_columns
    num_lines = -(-len(rows) // num_columns)
    figure, axes = plots.diagram(plots.WIDTH, 82 + pitch * num_lines)
    plots.text(axes, _MARGIN, 24, f"{result['device']}: median times", size=12)
    plots.text(axes, plots.WIDTH - _MARGIN, 24, "ratio: theirs over ours", color=GREY, ha="right")
    entries = [(BLUE, "deeplab_jax"), (ORANGE, "torchvision in its fastest mode")]
    if any(len(row["theirs_by_mode"]) > 1 for row in rows):
        entries.append((_OTHER, "torchvision in other modes"))
    plots.legend(axes, _MARGIN, 56, entries)
    for index, row in enumerate(rows):
        line, column = divmod(index, num_columns)
        left = _MARGIN + column * (width + _MARGIN)
        _draw_case(axes, row, left, 94 + pitch * line, width)
    return figure


def _draw_case(axes: Axes, row: dict[str, Any], left: float, top: float, width: float) -> None:
    theirs = row["theirs_by_mode"]
    best = min(theirs, key=theirs.get, default=None)
    bars = [("deeplab_jax", row["ours_seconds"], BLUE)]
    bars += [
        (mode, seconds, ORANGE if mode == best else _OTHER) for mode, seconds in theirs.items()
    ]
    plots.text(axes, left, top, row["name"], size=10.5)
    if theirs:
        words = f"ratio {row['ratio']:.2f}"
        plots.text(axes, left + width - 8, top, words, size=10.5, ha="right", weight="bold")
    start = left + max(plots.text_width(mode, 9.5) for mode, _, _ in bars) + 10
    scale = (left + width - _VALUE - start) / max(seconds for _, seconds, _ in bars)
    for index, (mode, seconds, color) in enumerate(bars):
        y = top + 26 + _BAR * index
        plots.text(axes, start - 8, y, mode, size=9.5, ha="right")
        axes.barh(y, seconds * scale, 0.72 * _BAR, left=start, color=color)
        plots.text(axes, start + seconds * scale + 8, y, _spell(seconds), size=9.5, color=GREY)


def _spell(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 0.5 else f"{seconds:.2f} s"
