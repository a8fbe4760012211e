"""The study's pictures: each seed of each row, and what models at three output strides predict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from study_runs import Training

import deeplab_jax as dl
from deeplab_jax import data
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.utils.errors import UserError
from deeplab_jax.visualization.canvas import (
    BLUE,
    GREY,
    INK,
    LIGHT,
    VERMILLION,
    Canvas,
    Color,
    text_width,
)
from deeplab_jax.visualization.image_grid import colorize

Picture = UInt8[np.ndarray, "h w 3"]

_LEFT, _RIGHT, _ROW, _TITLE = 430, 40, 24, 40  # pixels
_WIDTH = 960
_SPAN = 0.4  # mIoU from left to right; what lies farther left is written
_DOT, _MEAN = BLUE, VERMILLION
_BAND: Color = (240, 240, 240)


def seeds_figure(
    groups: Mapping[str, Sequence[tuple[str, Sequence[float]]]], base: Sequence[float]
) -> Picture:
    """A line a row, a dot a seed, a stroke at their mean; a band where the base's seeds lie.

    Rows far below all others are written in numbers, so that the others can be told apart.

    Args:
      groups: by title, the rows' words and mIoU, 0..1, of each seed.
      base: mIoU of the base's seeds.
    """
    shown = {title: [row for row in rows if row[1]] for title, rows in groups.items()}
    shown = {title: rows for title, rows in shown.items() if rows}
    values = [value for rows in shown.values() for _, row in rows for value in row]
    high = math.ceil(20 * max(values)) / 20
    low = math.floor(20 * max(min(values), high - _SPAN)) / 20
    height = sum(_TITLE + _ROW * len(rows) for rows in shown.values()) + 70
    canvas = Canvas(_WIDTH, height)

    def place(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    bottom = height - 44
    if base:
        left, right = place(min(base)), place(max(base))
        canvas.box(left, 16, max(right, left + 1), bottom, fill=_BAND, outline=None)
    for tick in range(round(low * 20), round(high * 20) + 1):
        x = place(tick / 20)
        canvas.line([(x, 16), (x, bottom)], LIGHT)
        canvas.text(x, bottom + 14, f"{5 * tick}", anchor="mm", size=13, color=GREY)
    canvas.text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 32, "mIoU, %", anchor="mm", size=13)
    y = 8.0
    for title, rows in shown.items():
        y += _TITLE
        canvas.text(16, y - 14, title, size=15)
        for words, row in rows:
            middle = y + _ROW / 2 - 4
            canvas.text(32, middle, words, size=13, color=INK)
            if min(row) < low:
                beyond = ", ".join(f"{100 * value:.1f}" for value in row)
                canvas.text(_LEFT + 4, middle, f"farther left: {beyond}", size=13, color=_DOT)
            else:
                _dots(canvas, [place(value) for value in row], middle)
            y += _ROW
    return canvas.picture()


def _dots(canvas: Canvas, xs: Sequence[float], y: float) -> None:
    mean = sum(xs) / len(xs)
    canvas.line([(mean, y - 8), (mean, y + 8)], _MEAN, 2.5)
    for x in xs:
        canvas.dot(x, y, 3.5, _DOT)


_EXAMPLES = (1, 4, 12)  # of the split that is evaluated
_SIDE, _GAP, _LINE = 256, 12, 28  # pixels: of a panel at most


def examples(runs: Sequence[Training]) -> Picture:
    """Images of val, their labels, and what each run's last checkpoint predicts.

    Raises:
      UserError: there is no run.
    """
    if not runs:
        raise UserError("--examples shows os32, base and os8, of which none was run")
    config = runs[0].last_stage()
    val = data.load(config.data, config.data.eval_split)
    segmenters = [dl.load(run.checkpoint()) for run in runs]
    strides = [run.last_stage().model.output_stride for run in runs]
    titles = ["image", "label", *(f"output stride {stride}" for stride in strides)]
    factor = max(1, _SIDE // config.data.shapes.size)
    step = config.data.shapes.size * factor + _GAP
    canvas = Canvas(_GAP + len(titles) * step, 2 * _LINE + len(_EXAMPLES) * step)
    for column, title in enumerate(titles):
        canvas.text(_GAP + column * step, _LINE / 2, title, size=15)
    for line, index in enumerate(_EXAMPLES):
        example = val.source[index % len(val.source)]
        ids = [example["label"], *(known.predict(example["image"]) for known in segmenters)]
        pictures = [example["image"], *(colorize(each, val.labels) for each in ids)]
        for column, picture in enumerate(pictures):
            enlarged = picture.repeat(factor, 0).repeat(factor, 1)
            canvas.paste(enlarged, _GAP + column * step, _LINE + line * step)
    _legend(canvas, val.labels, canvas.height - _LINE / 2)
    return canvas.picture()


def _legend(canvas: Canvas, labels: LabelSet, y: float) -> None:
    x = float(_GAP)
    for name, color in zip(
        (*labels.names, "ignored"), (*labels.colors, (255, 255, 255)), strict=True
    ):
        canvas.box(x, y - 7, x + 14, y + 7, fill=color)
        canvas.text(x + 20, y, name, size=14)
        x += 44 + text_width(name, 14)
