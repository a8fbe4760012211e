"""A chart of a calibration: reliability diagrams, and the risk and coverage of thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from deeplab_jax.visualization.plots import BLUE, GREY, INK, VERMILLION, clean_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def calibration_plot(
    before: Float[np.ndarray, "3 bins"],
    after: Float[np.ndarray, "3 bins"],
    points: Sequence[dict[str, Any]],
    rule: dict[str, Any],
    stated_risk: float,
) -> Figure:
    """Draws the reliability before and after calibration, and the risk over the coverage.

    Args:
      before, after: `Reliability.top`, by bin.
      points, rule: "coverage" and "risk" at each threshold, and at the chosen one.
      stated_risk: that the rule keeps.
    """
    figure = new_figure(1150, 400, layout="constrained")
    left, middle, axes = figure.subplots(1, 3)
    _reliability(left, before, "Before")
    _reliability(middle, after, "After")
    x, y = (np.array([100 * p[key] for p in (*points, rule)]) for key in ("coverage", "risk"))
    axes.plot(x[:-1], y[:-1], color=BLUE, label="risk")
    axes.axhline(100 * stated_risk, color=GREY, linewidth=0.9, linestyle=":", label="stated risk")
    axes.scatter(
        x[-1:], y[-1:], color=VERMILLION, zorder=4, label=f"{y[-1]:.2f} % at {x[-1]:.1f} %"
    )
    axes.set_title("Risk and coverage of the rule", fontsize=10, color=INK)
    axes.set(xlabel="pixels that are not unsure, %", ylabel="risk, %")
    axes.set(xlim=(0, 102), ylim=(0, None), box_aspect=1)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    clean_axes(axes)
    return figure


def _reliability(axes: Axes, top: np.ndarray, title: str) -> None:
    """Draws bars of accuracy by bin, whose darkness is the share of the pixels."""
    from matplotlib import colormaps

    edges = np.linspace(0, 1, top.shape[1] + 1)
    used = top[0] > 0
    pixels, confidence, correct = top[:, used]
    left, width = edges[:-1][used], edges[1]
    shades = colormaps["Blues"](0.25 + 0.75 * np.sqrt(pixels / pixels.max()))
    axes.bar(left, correct / pixels, width, align="edge", color=shades, zorder=2)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=":", zorder=3)
    style: dict[str, Any] = {"color": VERMILLION, "marker": "_", "s": 90, "zorder": 4}
    axes.scatter(left + width / 2, confidence / pixels, label="mean probability", **style)
    error = np.abs(correct - confidence).sum() / pixels.sum()
    axes.set_title(f"{title}: ECE {error:.4f}", fontsize=10, color=INK)
    axes.set(xlabel="probability of the predicted class", ylabel="share of correct pixels")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), box_aspect=1)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    clean_axes(axes)
