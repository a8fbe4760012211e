"""Section 8 of the guide: the learning rate of the paper's two stages."""

from __future__ import annotations

import dataclasses

import numpy as np

from deeplab_jax.config import Config
from deeplab_jax.training.optimizer import poly_schedule
from deeplab_jax.visualization.canvas import BLUE, GREEN, GREY, ORANGE, Canvas
from drawing.sheet import (
    MARGIN,
    WIDTH,
    Axes,
    Picture,
)


def poly() -> Picture:
    """The learning rate of the paper's two stages."""
    config = Config()
    first, second, steps = config.optimizer, config.second_stage, config.train.steps
    last = 2 * steps
    top = first.learning_rate
    canvas = Canvas(WIDTH, 330)
    axes = Axes(MARGIN + 50, 34, WIDTH - 2 * MARGIN - 60, 220, (0, last), (0, top))
    ticks = {float(x): f"{x:,}".replace(",", " ") for x in range(0, last + 1, steps // 3)}
    axes.draw(canvas, ticks, {y / 1000: f"{y / 1000:g}" for y in range(8)}, "step")
    at = np.linspace(0, steps, 301)
    linear = dataclasses.replace(first, power=1.0)
    canvas.line(axes.points(at, _rates(linear, steps, at)), ORANGE, 2)
    canvas.line(axes.points(at, _rates(first, steps, at)), BLUE, 3)
    stage2 = dataclasses.replace(first, learning_rate=second.learning_rate)
    canvas.line(axes.points(steps + at, _rates(stage2, steps, at)), GREEN, 3)
    x = axes.point(steps, 0)[0]
    canvas.dashed((x, axes.top), (x, axes.top + axes.height), GREY)
    told = f"{steps:,}".replace(",", " ")
    canvas.text(x - 12, 48, "first stage, output stride 16", size=15, anchor="rm")
    canvas.text(x + 12, 48, "second stage, output stride 8, batch norm frozen", size=15)
    for place, (color, text) in enumerate(
        [
            (BLUE, f"{first.learning_rate:g} (1 - step / {told})^{first.power:g}"),
            (GREEN, f"{second.learning_rate:g} (1 - step / {told})^{first.power:g}"),
            (ORANGE, "power 1"),
        ]
    ):
        left = axes.left + 285 * place
        canvas.line([(left, 314), (left + 24, 314)], color, 4)
        canvas.text(left + 32, 314, text, size=14)
    return canvas.picture()


def _rates(config: object, steps: int, at: np.ndarray) -> np.ndarray:
    """Of the project's own schedule."""
    return np.asarray(poly_schedule(config, steps)(at))  # type: ignore[arg-type]
