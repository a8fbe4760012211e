"""Section 6 of the guide: ASPP, the taps that fall on the map, and what the logits depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deeplab_jax.analysis.conv_trace import Convolution
from deeplab_jax.analysis.plots import draw_part, field_figure, model_figure
from deeplab_jax.analysis.receptive_field import effective_field
from deeplab_jax.analysis.summary import ModuleSummary, format_count
from deeplab_jax.models.architecture import Architecture, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.ops.atrous_conv import atrous_conv
from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import GREY, ORANGE, PURPLE, SKY, VERMILLION
from drawing.network import SIZE, shape_text, summary_of
from drawing.sheet import MARGIN, colored

TAP_COLORS = {1: VERMILLION, 2: PURPLE, 4: ORANGE, 6: SKY, 9: "#004880"}


def valid_taps(side: int, rate: int) -> Int[np.ndarray, "side side"]:
    """Counts the taps of a 3x3 that fall on the map, at each position: a convolution of ones."""
    ones = jnp.ones((1, side, side, 1))
    counts = atrous_conv(ones, jnp.ones((3, 3, 1, 1)), kernel_dilation=rate, method="native")
    return np.rint(np.asarray(counts))[0, :, :, 0].astype(int)


def aspp() -> Figure:
    """ASPP's branches, and where their taps fall on the map."""
    summary = summary_of("paper_resnet50")
    convs = [c for c in summary.all.convolutions if c.name.startswith("classifier.")]
    branches = [c for c in convs if ".branches." in c.name]
    project, logits = convs[len(branches) :]
    figure, axes = plots.diagram(plots.WIDTH, 556)
    pitch, top, side = 102, 14, 33
    x_box, x_map, x_text, x_join = 206, 384, 470, 668
    middle = top + pitch * (len(branches) - 1) / 2 + 40
    words = f"features of\nblock4\n{shape_text(branches[0].in_shape)}"
    block4 = [c for c in summary.all.convolutions if c.name.startswith("backbone.layer4")]
    _draw_box(axes, block4, (MARGIN, middle), (126, 74), words)
    turn = x_box - 26
    for row, conv in enumerate(branches):
        y = top + pitch * row + 40
        plots.arrow(axes, [(MARGIN + 126, middle), (turn, middle), (turn, y), (x_box - 2, y)])
        plots.arrow(axes, [(x_box + 140, y), (x_join, y)], head=False)
        pooled = conv.output_stride is None
        title = f"{conv.kernel_size}x{conv.kernel_size}"
        if pooled:
            title = "image pooling:\nmean, then 1x1"
        elif conv.rate > 1:
            title += f" rate {conv.rate}"
        _draw_box(axes, [conv], (x_box, y), (140, 56), title)
        above = "sees the whole image" if pooled else ""
        if conv.kernel_size > 1:
            plots.picture(
                axes, colored(valid_taps(side, conv.rate), TAP_COLORS), x_map, y - side, 2
            )
            above = f"{100 * conv.valid_fraction:.1f} % of taps"
        cost = [f"{2 * conv.macs / 1e9:.3f} GFLOP", f"{format_count(conv.params)} parameters"]
        plots.text(axes, x_text, y - 13, above or cost[0])
        for line, words in enumerate(cost if above else cost[1:]):
            plots.text(axes, x_text, y + 15 + 20 * line, words, size=9.5, color=GREY)
    height = 4 * pitch + 52
    words = f"joined,\n1x1:\n{project.in_shape[2]} to\n{project.out_shape[2]}"
    _draw_box(axes, [project], (x_join, middle), (88, height), words)
    plots.arrow(axes, [(x_join + 88, middle), (x_join + 116, middle)])
    _draw_box(axes, [logits], (x_join + 118, middle), (92, 56), "1x1\nlogits")
    words = shape_text(logits.out_shape)
    plots.text(axes, x_join + 164, middle + 44, words, size=9.5, ha="center", color=GREY)
    y = top + pitch * len(branches) + 12
    plots.text(axes, MARGIN, y, f"valid taps of nine on the {side}x{side} map:")
    entries = [(TAP_COLORS[taps], str(taps)) for taps in (9, 6, 4, 2, 1)]
    plots.legend(axes, 290, y, entries)
    return figure


def model() -> Figure:
    """Valid taps by rate, and blocks: `summary --plot`."""
    return model_figure(summary_of("paper_resnet50"))


def _draw_box(
    axes: Axes,
    convolutions: Sequence[Convolution],
    left_middle: tuple[float, float],
    size: tuple[float, float],
    words: str,
) -> None:
    """A box for convolutions, given by the middle of its left side."""
    left, middle = left_middle
    part = ModuleSummary(words, tuple(convolutions))
    draw_part(axes, part, left, middle - size[1] / 2, *size, words)


# --- The effective receptive field -------------------------------------------------------------


def fields() -> list[tuple[str, Architecture]]:
    """The models compared: the same random parameters without rates, and without image pooling."""
    model = architecture("paper_resnet18", num_classes=21)
    no_pooling = dataclasses.replace(model, image_pooling=False)
    ones = dataclasses.replace(no_pooling, atrous_rates=(1, 1, 1))
    return [
        ("ASPP rates 1, 1, 1\nno image pooling", ones),
        ("ASPP rates 6, 12, 18\nno image pooling", no_pooling),
        ("ASPP rates 6, 12, 18\nand image pooling", model),
    ]


def receptive_field() -> Figure:
    """What the logits depend on, by ASPP's rates and pooling."""
    found = []
    for name, model in fields():
        variables = jax.jit(FunctionalModel(model).init)(jax.random.key(0))
        found.append((name, effective_field(model, variables, SIZE, SIZE, samples=4)))
    return field_figure(found, "Effective receptive field of paper_resnet18, random weights")
