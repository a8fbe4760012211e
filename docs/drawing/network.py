"""Sections 4, 7 and 9 of the guide: blocks, output strides and rates, read from traced models."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deeplab_jax.analysis.conv_trace import Convolution
from deeplab_jax.analysis.plots import draw_part
from deeplab_jax.analysis.summary import ModuleSummary, Summary, format_count, summarize
from deeplab_jax.models.architecture import architecture
from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import GREY, LIGHT, VERMILLION
from drawing.sheet import MARGIN

SIZE = 513  # of the image, pixels: the paper's crop


@functools.cache
def summary_of(name: str, **overrides: Any) -> Summary:
    """Summarizes a named architecture with 21 classes at `SIZE`, some of its fields replaced."""
    return summarize(architecture(name, num_classes=21, **overrides), SIZE)


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


OUTPUT_STRIDES = (32, 16, 8)


def output_stride() -> Figure:
    """ResNet-50's blocks at output strides 32, 16 and 8."""
    names = {
        "conv1": "backbone.stem",
        **{f"block{number}": f"backbone.layer{number}" for number in range(1, 5)},
        "ASPP": "classifier.aspp",
        "logits": "classifier.logits",
    }
    return _chains(
        [
            (f"output stride {stride}", summary_of("paper_resnet50", output_stride=stride))
            for stride in OUTPUT_STRIDES
        ],
        names,
    )


def cascades() -> list[tuple[str, Summary]]:
    """Titles and summaries of ResNet-50 up to block7: strided, atrous, with a multi-grid."""
    plain = (1, 1, 1)
    choices: dict[str, dict[str, Any]] = {
        "strided: output stride 256": {"output_stride": 256, "multi_grid": plain},
        "atrous: output stride 16": {"output_stride": 16, "multi_grid": plain},
        "output stride 16, multi-grid (1, 2, 4)": {"output_stride": 16},
    }
    return [
        (title, summary_of("paper_resnet50", cascade=3, **chosen))
        for title, chosen in choices.items()
    ]


def cascade() -> Figure:
    """block4 to block7: strided, atrous, with a multi-grid."""
    names = {f"block{number}": f"backbone.layer{number}" for number in range(1, 8)}
    return _chains(cascades(), names)


_CHAIN = 226  # height of a chain with its texts


def _chains(rows: Sequence[tuple[str, Summary]], names: dict[str, str]) -> Figure:
    """Chains of blocks of several models, one below the other.

    Args:
      rows: title and summary of each model.
      names: shown name -> name of the part of the model.
    """
    figure, axes = plots.diagram(plots.WIDTH, 46 + _CHAIN * len(rows))
    for row, (title, summary) in enumerate(rows):
        top = 26 + _CHAIN * row
        line = [(MARGIN, top + 204), (plots.WIDTH - MARGIN, top + 204)]
        plots.arrow(axes, line, head=False, color=LIGHT)
        plots.text(axes, MARGIN, top, title, size=12)
        gflop = 2 * summary.all.macs / 1e9
        cost = f"{gflop:.0f} GFLOP, {format_count(summary.params)} parameters"
        plots.text(axes, plots.WIDTH - MARGIN, top, cost, size=10.5, ha="right")
        parts = {part.name: part for part in summary.parts}
        _draw_chain(axes, top + 30, [(shown, parts[name]) for shown, name in names.items()])
    words = "darker: larger output stride; framed: atrous; FOV: side of the field of view in pixels"
    plots.text(axes, MARGIN, 24 + _CHAIN * len(rows), words, color=GREY)
    return figure


def _draw_chain(axes: Axes, top: float, blocks: Sequence[tuple[str, ModuleSummary]]) -> None:
    """Boxes whose heights show the sizes of the maps; names above, numbers below."""
    pitch = (plots.WIDTH - 2 * MARGIN) / len(blocks)
    tallest, middle = 80, top + 58
    for index, (title, part) in enumerate(blocks):
        conv = last_map(part)
        left, width = MARGIN + index * pitch + 9, pitch - 18
        x = left + width / 2
        height = max(14.0, tallest * math.sqrt(conv.out_shape[0] / 257))
        atrous = any(rate > 1 for rate in part.rates)
        if index:
            plots.arrow(axes, [(left - 18, middle), (left, middle)], head=False)
        draw_part(axes, part, left, middle - height / 2, width, height)
        plots.text(axes, x, middle - tallest / 2 - 15, title, ha="center")
        rates = f"rate{'s' if len(part.rates) > 1 else ''} {', '.join(map(str, part.rates))}"
        facts = [
            (shape_text(conv.out_shape[:2]), GREY),
            (f"FOV {largest_view(part)}", GREY),
            (rates, VERMILLION) if atrous else (f"output stride {conv.output_stride}", GREY),
        ]
        for row, (words, color) in enumerate(facts):
            y = middle + tallest / 2 + 16 + 19 * row
            plots.text(axes, x, y, words, size=9.5, ha="center", color=color, max_width=pitch - 2)


def last_map(part: ModuleSummary) -> Convolution:
    """The last convolution that is not behind image pooling."""
    return next(c for c in reversed(part.convolutions) if c.output_stride is not None)


def largest_view(part: ModuleSummary) -> int:
    """The largest field of view, pixels."""
    return max(c.field_of_view for c in part.convolutions if c.field_of_view is not None)


# --- Heads -------------------------------------------------------------------------------------

LOW_LEVEL = "1x1 of block1"
_NAMES = {
    "classifier.aspp": "ASPP",
    "classifier.head_conv": "3x3",
    "classifier.decoder.low_level": LOW_LEVEL,
    "classifier.decoder.conv1": "3x3",
    "classifier.decoder.conv2": "3x3",
    "classifier.logits": "logits",
}
HEADS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("the paper's", "paper_resnet50", {}),
    ("torchvision's", "torchvision_resnet50", {}),
    ("DeepLabv3+'s decoder", "paper_resnet50", {"decoder": "plus"}),
)


def heads() -> Figure:
    """The heads of the paper, torchvision and DeepLabv3+."""
    figure, axes = plots.diagram(plots.WIDTH, 606)
    for row, (title, name, overrides) in enumerate(HEADS):
        top = 26 + 156 * row
        summary = summary_of(name, **overrides)
        plots.text(axes, MARGIN, top, title, size=12)
        about = f"{name}, output stride {summary.architecture.output_stride}"
        if summary.architecture.aux_head:
            about += "; also an auxiliary head on block3: 3x3, logits"
        plots.text(axes, MARGIN + 210, top, about, color=GREY)
        _draw_head(axes, top + 56, head_parts(summary))
    return figure


def head_parts(summary: Summary) -> list[tuple[str, ModuleSummary]]:
    """The steps of the main head with their convolutions, in the order of execution."""
    steps: dict[str, list[Convolution]] = {}
    for conv in summary.all.convolutions:
        key = next((k for k in _NAMES if f"{conv.name}.".startswith(f"{k}.")), None)
        if key is not None:
            steps.setdefault(key, []).append(conv)
    return [(_NAMES[key], ModuleSummary(key, tuple(convs))) for key, convs in steps.items()]


_PITCH, _BOX = 146, 108  # from step to step, and width of a box


def _draw_head(axes: Axes, middle: float, steps: list[tuple[str, ModuleSummary]]) -> None:
    """A box for each step from left to right; low-level features join from below."""
    x = float(MARGIN)
    for index, (name, part) in enumerate(steps):
        if name == LOW_LEVEL:  # between ASPP and the convolution that reads both
            before, joined, below = x - _PITCH + _BOX, x + _PITCH - 34, middle + 118
            plots.arrow(axes, [(before, middle), (x + _PITCH - 2, middle)])
            side = part.convolutions[-1].out_shape[0]
            resized = f"resized to {side}x{side}"
            plots.text(axes, (before + joined) / 2, middle - 14, resized, ha="center")
            left = joined - 22 - _BOX
            _draw_step(axes, left, below, name, part)
            joint = joined, middle
            plots.arrow(axes, [(left + _BOX, below), (joined, below), joint], head=False)
        else:
            _draw_step(axes, x, middle, name, part)
            if name == "logits" or steps[index + 1][0] != LOW_LEVEL:
                plots.arrow(axes, [(x + _BOX, middle), (x + _PITCH - 2, middle)])
        x += _PITCH
    plots.text(axes, x + 2, middle, f"resized to {SIZE}x{SIZE}")


def _draw_step(axes: Axes, left: float, middle: float, name: str, part: ModuleSummary) -> None:
    """A box with its name; below it its map and its arithmetic."""
    draw_part(axes, part, left, middle - 22, _BOX, 44, name)
    words = f"{shape_text(last_map(part).out_shape)}\n{2 * part.macs / 1e9:.2f} GFLOP"
    x = left + _BOX / 2
    plots.text(axes, x, middle + 33, words, size=9.5, ha="center", va="top", color=GREY)
