"""Charts and diagrams by Matplotlib, and the confusion matrix as a chart.

Only the functions that draw import Matplotlib, so that no other command pays for it. They use its
`Figure` directly: no pyplot, hence no global list of figures and no window. The unit of lengths is
1/100 inch, the origin the upper left corner.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Integer, UInt8

from deeplab_jax.data.labels import LabelSet
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_bytes, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")  # of the files that a chart can be written to
WIDTH = 900  # of a diagram, units of 1/100 inch: about as many pixels as a README is wide
DPI = 200

INK, GREY, LIGHT = "#282828", "#6e6e6e", "#dedede"
# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart.
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILLION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"

Point = tuple[float, float]


# --- Figures and files -------------------------------------------------------------------------


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Creates an empty figure, with options of `Figure`; `DPI` gives 2 pixels for each unit."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 100, height / 100), dpi=DPI, **options)


def rasterize(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
    """Renders a figure as RGB pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3]


def save(path: pathlib.Path, figure: Figure) -> None:
    """Writes a figure atomically as PNG, SVG or PDF; the same figure gives the same bytes.

    Raises:
      UserError: `path` has another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"a chart must be a file that ends in {' or '.join(SUFFIXES)}, got {path}")
    if suffix == ".png":
        write_png(path, rasterize(figure))
        return
    import matplotlib

    encoded = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else {"CreationDate": None}
    with matplotlib.rc_context({"svg.hashsalt": "deeplab_jax"}):  # else ids are random
        figure.savefig(encoded, format=suffix[1:], metadata=metadata)
    write_bytes(path, encoded.getvalue())


def clean_axes(axes: Axes, grid: str = "both") -> None:
    """Gives axes a quiet style; `grid` is "x", "y", "both" or "": the ticks with grid lines."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=GREY)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=LIGHT, linewidth=0.8)  # type: ignore[arg-type]


# --- Diagrams: boxes, arrows, pixels and texts at given coordinates ---------------------------


def diagram(width: float, height: float) -> tuple[Figure, Axes]:
    """Creates a figure and invisible axes, to draw on in units."""
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.axis("off")
    return figure, axes


def chart_axes(axes: Axes, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes for a chart to a diagram."""
    from matplotlib.transforms import Bbox

    box = Bbox([(left, top + height), (left + width, top)])
    return axes.figure.add_axes(box.transformed(axes.transData - axes.figure.transSubfigure).bounds)


def text_width(words: str, size: float = 10) -> float:
    """Measures a line of text; `size` is that of the font, points."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), words, size=size).get_extents().x1 / 0.72


def text(
    axes: Axes,
    x: float,
    y: float,
    words: str,
    *,
    size: float = 10,
    color: str = INK,
    ha: str = "left",
    va: str = "center",
    spacing: float = 1.45,
    max_width: float = math.inf,
    weight: str = "normal",
) -> None:
    """Writes one or more lines of text at a point of a diagram.

    `size` is that of the font in points; `ha` and `va` say which side or corner of the text is at
    the point; `spacing` is the distance of baselines in font sizes. Text that is wider than
    `max_width` is shrunk, but not below 6 points.
    """
    lines = words.splitlines()
    widest = max(text_width(line, size) for line in lines)
    if widest > max_width:
        size = max(6.0, size * max_width / widest)
    # Placed by baselines: Matplotlib centres ink, which moves with the letters of a line.
    step, cap = spacing * size / 0.72, size
    above = {"top": 0.0, "center": 0.5, "bottom": 1.0}[va] * (cap + step * (len(lines) - 1))
    for row, line in enumerate(lines):
        baseline = y + cap - above + step * row
        axes.text(x, baseline, line, fontsize=size, color=color, ha=ha, weight=weight)


def box(
    axes: Axes,
    left: float,
    top: float,
    width: float,
    height: float,
    words: str = "",
    *,
    fill: str = "none",
    edge: str = INK,
    line: float = 0.8,
    rounding: float = 4,
    size: float = 10,
) -> None:
    """Draws a box with rounded corners and text in its middle, shrunk if it is too wide.

    `line` is the width of the outline in points, 0 for none; `rounding` the radius of the corners;
    `size` that of the font, points.
    """
    from matplotlib.patches import FancyBboxPatch

    rounding = min(rounding, width / 4, height / 4)
    axes.add_patch(
        FancyBboxPatch(
            (left, top),
            width,
            height,
            boxstyle=f"round,pad=0,rounding_size={rounding}",
            facecolor=fill,
            edgecolor=edge,
            linewidth=line,
            zorder=2,
        )
    )
    if words:
        middle = left + width / 2, top + height / 2
        text(axes, *middle, words, size=size, ha="center", max_width=width - 8)


def arrow(axes: Axes, points: Sequence[Point], *, head: bool = True, color: str = GREY) -> None:
    """Draws straight lines from point to point, with an arrow's head at the last one."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    style = "-|>,head_length=6,head_width=2.5" if head else "-"
    path = Path(np.asarray(points, float))
    axes.add_patch(
        FancyArrowPatch(
            path=path, arrowstyle=style, color=color, linewidth=1.0, joinstyle="miter", zorder=0.9
        )
    )


def picture(
    axes: Axes, pixels: UInt8[np.ndarray, "h w 3"], left: float, top: float, scale: float = 1
) -> None:
    """Draws pixels as squares of side `scale`, with a thin frame around them."""
    height, width = (scale * side for side in pixels.shape[:2])
    extent = (left, left + width, top + height, top)
    axes.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto", zorder=1.5)
    box(axes, left, top, width, height, edge=GREY, rounding=0)


def legend(axes: Axes, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
    """Draws a line of (colour, name) pairs from `x` on: a square of the colour, then the name."""
    for color, name in entries:
        box(axes, x, y - 7, 14, 14, fill=color, rounding=2)
        if name:
            text(axes, x + 20, y, name)
            x += 42 + text_width(name)


# --- The confusion matrix ----------------------------------------------------------------------


def confusion_plot(
    matrix: Integer[np.ndarray, "classes classes"] | Sequence[Sequence[int]], labels: LabelSet
) -> Figure:
    """Draws a confusion matrix as a heat map, each row in percent of its true class's pixels.

    Cells hold their number where they are large enough, unless it is below 0.05 %. A row whose
    class has no pixels is grey. Rows are true classes, columns predicted ones.
    """
    from matplotlib import colormaps

    counts = np.asarray(matrix, np.float64)
    totals = counts.sum(1, keepdims=True)
    percent = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    num_classes = len(counts)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in labels.names]
    cell = float(np.clip(850 / num_classes, 16, 66))
    side = max(num_classes * cell, 200) + max(text_width(name, 9) for name in names)
    figure = new_figure(side + 160, side + 50, layout="constrained")
    axes = figure.subplots()
    shades = colormaps["Blues"].with_extremes(bad="#d0d0d0")
    style: dict[str, Any] = {"vmin": 0, "vmax": 100, "edgecolors": LIGHT, "linewidth": 0.5}
    mesh = axes.pcolormesh(np.ma.masked_invalid(percent), cmap=shades, **style)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    clean_axes(axes, grid="")
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks(np.arange(num_classes) + 0.5, names, rotation=90)
    axes.set_yticks(np.arange(num_classes) + 0.5, names)
    axes.xaxis.set_label_position("top")
    axes.set(xlabel="predicted class", ylabel="true class")
    if cell >= 30:
        for row, column in np.argwhere(percent >= 0.05):
            value = percent[row, column]
            numbers = f"{value:.{1 if cell >= 45 or value < 9.95 else 0}f}"
            style = {"fontsize": 8, "color": "white" if value > 50 else INK}
            axes.text(column + 0.5, row + 0.5, numbers, ha="center", va="center", **style)
    bar = figure.colorbar(mesh, aspect=30, shrink=0.8, label="% of the true class's pixels")
    clean_axes(bar.ax, grid="")
    bar.outline.set_visible(False)
    return figure


# --- ROC and precision-recall curves -----------------------------------------------------------


def binary_curves(points: dict[str, np.ndarray], numbers: dict[str, Any]) -> Figure:
    """Draws the ROC curve and the precision-recall curve of a class against the rest.

    Grey lines show scores without information. Points show the prediction and the best F1.

    Args:
      points: of `Curves.points`; a curve whose points are NaN stays empty.
      numbers: as of `evaluation.report.binary`.
    """
    figure = new_figure(900, 500, layout="constrained")
    figure.suptitle(f"{numbers['positive']} against the rest", fontsize=11, color=INK)
    roc, precision_recall = figure.subplots(1, 2)
    positives, negatives = numbers["positive_pixels"], numbers["negative_pixels"]

    def set_title(axes: Axes, name: str, value: float | None) -> None:
        words = f"{name}: undefined" if value is None else f"{name} {value:.4f}"
        axes.set_title(words, fontsize=10, color=INK)

    line = {"color": BLUE, "linewidth": 1.6, "zorder": 3}
    recalls, rates = (np.r_[0, points[name]] for name in ("recall", "false_positive_rate"))
    roc.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=":")
    roc.plot(rates, recalls, **line)
    roc.set(xlabel="false positive rate", ylabel="recall (true positive rate)")
    set_title(roc, "ROC, area", numbers["auroc"])
    share = positives / max(positives + negatives, 1)
    precision_recall.axhline(share, color=GREY, linewidth=0.9, linestyle=":")
    # The precision of a point is that of the recall gained since the point before.
    precisions = np.r_[points["precision"][:1], points["precision"]]
    precision_recall.step(recalls, precisions, where="pre", **line)
    precision_recall.set(xlabel="recall", ylabel="precision")
    set_title(precision_recall, "Precision-recall, average precision", numbers["average_precision"])
    marks: dict[str, tuple[Any, ...]] = {}
    if (at := numbers["best_threshold"]) is not None:
        best = int(np.argmin(np.abs(points["threshold"] - at)))
        x, y, rate = (points[name][best] for name in ("recall", "precision", "false_positive_rate"))
        marks[f"best F1 {numbers['best_f1']:.3f}, threshold {at:.3g}"] = GREEN, "D", x, y, rate
    recall, precision, threshold = (numbers[x] for x in ("recall", "precision", "threshold"))
    if recall is not None and precision is not None:
        false_positives = recall * positives * (1 / precision - 1) if precision else math.nan
        rate = false_positives / negatives if negatives else math.nan
        rule = "most probable class" if threshold is None else f"threshold {threshold:g}"
        marks[f"F1 {numbers['f1']:.3f}, {rule}"] = VERMILLION, "o", recall, precision, rate
    for label, (color, marker, x, y, rate) in marks.items():
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "none", "zorder": 4}
        roc.plot(rate, x, label=label, **style)
        precision_recall.plot(x, y, **style)
    for axes in (roc, precision_recall):
        clean_axes(axes)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
    if marks:
        roc.legend(loc="lower right", fontsize=8, frameon=False)
    return figure


# --- Calibration -------------------------------------------------------------------------------


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
