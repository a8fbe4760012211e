"""Draws the figures of the study: the mIoU of each seed, and predictions at output strides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from study_runs import Training

import deeplab_jax as dl
from deeplab_jax import data
from deeplab_jax.utils.errors import UserError
from deeplab_jax.visualization import plots
from deeplab_jax.visualization.overlays import Picture, colorize, image_grid, legend
from deeplab_jax.visualization.plots import BLUE, GREY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW, _TITLE = 25, 42  # heights of a row and of a title with the space above it
_SPAN = 0.4  # mIoU from left to right; lower values are written as numbers


def seeds_figure(
    groups: Mapping[str, Sequence[tuple[str, Sequence[float]]]],
    bases: Mapping[str, Sequence[float]],
) -> Figure:
    """Draws a line per row, a dot per seed and a mark at their mean; a band spans a base's seeds.

    The values of rows far below all others are written as numbers, so that the others spread out.

    Args:
      groups: title -> rows, each with its description and the mIoU, 0..1, of each seed.
      bases: title -> mIoU of the seeds of the group's base.
    """
    shown = {title: [row for row in rows if row[1]] for title, rows in groups.items()}
    shown = {title: rows for title, rows in shown.items() if rows}
    values = [value for rows in shown.values() for _, row in rows for value in row]
    high = math.ceil(20 * max(values)) / 20
    low = math.floor(20 * max(min(values), high - _SPAN)) / 20
    chart_height = sum(_TITLE + _ROW * len(rows) for rows in shown.values()) + 16
    figure, sheet = plots.diagram(plots.WIDTH, chart_height + 110)
    top, left = 34, 396
    axes = plots.chart_axes(sheet, left, top, plots.WIDTH - left - 24, chart_height)
    plots.clean_axes(axes, grid="x")
    axes.set(xlim=(100 * low - 0.5, 100 * high + 0.5), ylim=(chart_height, 0), yticks=[])
    y = 0.0
    for title, rows in shown.items():
        if base := bases[title]:
            band = [y, y + _TITLE + _ROW * len(rows)]
            axes.fill_betweenx(band, 100 * min(base), 100 * max(base), color="#ececec", zorder=0)
        y += _TITLE
        plots.text(sheet, 20, top + y - 12, title, size=10.5, weight="bold")
        for words, row in rows:
            middle = y + _ROW / 2
            plots.text(sheet, 32, top + middle, words, size=9.5, max_width=left - 46)
            percent = 100 * np.asarray(row)
            if min(row) < low:
                numbers = ", ".join(f"{value:.1f}" for value in percent)
                axes.text(100 * low, middle, f"lower: {numbers}", color=BLUE, va="center")
            else:
                axes.vlines(percent.mean(), middle - 9, middle + 9, color=VERMILLION, linewidth=2.2)
                axes.plot(percent, np.full(len(row), middle), "o", color=BLUE, markersize=5.5)
            y += _ROW
    axes.tick_params(axis="x", labeltop=True)
    axes.set_xlabel("mIoU, %")
    words = "dot: a seed; bar: their mean;\nband: the range of the base's seeds"
    plots.text(sheet, 20, top + chart_height + 24, words, size=9.5, va="top", color=GREY)
    return figure


_EXAMPLES = (1, 4, 12)  # indices in the evaluation split
_SIDE = 256  # largest side of a panel, pixels


def examples(runs: Sequence[Training]) -> Picture:
    """Draws images of val, their labels, and the predictions of each run's last checkpoint.

    Raises:
      UserError: there is no run.
    """
    if not runs:
        raise UserError("--examples shows os32, base and os8, but none of them was run")
    config = runs[0].last_stage()
    val = data.load(config.data, config.data.eval_split)
    segmenters = [dl.load(run.checkpoint()) for run in runs]
    strides = [run.last_stage().model.output_stride for run in runs]
    titles = ["image", "label", *(f"output stride {stride}" for stride in strides)]
    factor = max(1, _SIDE // config.data.shapes.size)
    tiles = []
    for row, index in enumerate(_EXAMPLES):
        example = val.source[index % len(val.source)]
        ids = [example["label"], *(segmenter.predict(example["image"]) for segmenter in segmenters)]
        pictures = [example["image"], *(colorize(each, val.labels) for each in ids)]
        enlarged = [picture.repeat(factor, 0).repeat(factor, 1) for picture in pictures]
        tiles += zip(titles if row == 0 else [""] * len(titles), enlarged, strict=True)
    grid = image_grid(tiles, len(titles), config.data.shapes.size * factor)
    entries = [(*entry, "") for entry in zip(val.labels.colors, val.labels.names, strict=True)]
    entries.append(((255, 255, 255), "ignored", ""))
    return np.concatenate([grid, legend(entries, grid.shape[1])])
