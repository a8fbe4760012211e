"""Section 8 of the guide: the learning rate of the paper's two stages."""

from __future__ import annotations

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from deeplab_jax.config import Config
from deeplab_jax.training.optimizer import make_schedule
from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import BLUE, GREEN, GREY, INK, ORANGE


def poly() -> Figure:
    """The learning rate of the paper's two stages."""
    config = Config()
    first, second, num_steps = config.optimizer, config.second_stage, config.train.steps
    figure = plots.new_figure(plots.WIDTH, 330, layout="constrained")
    axes = figure.subplots()
    plots.clean_axes(axes)
    steps = np.linspace(0, num_steps, 301)
    linear = dataclasses.replace(first, power=1.0)
    other = dataclasses.replace(first, learning_rate=second.learning_rate)
    axes.plot(steps, make_schedule(linear, num_steps)(steps), color=ORANGE, linewidth=1.5)
    axes.plot(steps, make_schedule(first, num_steps)(steps), color=BLUE, linewidth=2.2)
    axes.plot(num_steps + steps, make_schedule(other, num_steps)(steps), color=GREEN, linewidth=2.2)
    axes.axvline(num_steps, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    count = f"{num_steps:,}".replace(",", " ")
    for x, y, words, color in (
        (0.33, 0.74, f"{first.learning_rate:g} (1 - step / {count})^{first.power:g}", BLUE),
        (0.24, 0.26, "power 1: a straight line", ORANGE),
        (0.70, 0.22, f"{second.learning_rate:g} (1 - step / {count})^{first.power:g}", GREEN),
    ):
        axes.text(x * 2 * num_steps, y * first.learning_rate, words, color=color, ha="center")
    top = first.learning_rate
    axes.text(0.98 * num_steps, 1.02 * top, "first stage: output stride 16", ha="right", color=INK)
    words = "second stage: output stride 8, batch norm frozen"
    axes.text(1.02 * num_steps, 1.02 * top, words, color=INK)
    axes.set(xlim=(0, 2 * num_steps), ylim=(0, 1.1 * top), xlabel="step", ylabel="learning rate")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", " "))
    return figure
