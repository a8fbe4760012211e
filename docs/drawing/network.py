"""Sections 4, 7 and 9 of the guide: blocks, output strides and rates, read from traced models."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from deeplab_jax.analysis import summary as summaries
from deeplab_jax.analysis.conv_trace import Convolution
from deeplab_jax.analysis.summary import ModuleSummary, Summary
from deeplab_jax.models.architecture import architecture
from deeplab_jax.visualization.canvas import GREY, INK, LIGHT, VERMILLION, Canvas
from drawing.sheet import (
    MARGIN,
    STRIDE_COLORS,
    WIDTH,
    Picture,
    fitting,
    lines_of_text,
)

SIZE = 513  # of the image, pixels: the paper's crop


@functools.cache
def summary_of(name: str, **overrides: Any) -> Summary:
    """A named architecture of 21 classes at `SIZE`, with some choices made otherwise."""
    return summaries.summarize(architecture(name, num_classes=21, **overrides), SIZE)


OUTPUT_STRIDES = (32, 16, 8)


def output_stride() -> Picture:
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
    """ResNet-50 up to block7, titled: all strided, atrous, and with a multi-grid."""
    plain = (1, 1, 1)
    choices: dict[str, dict[str, Any]] = {
        "as it would go on: output stride 256": {"output_stride": 256, "multi_grid": plain},
        "output stride 16": {"output_stride": 16, "multi_grid": plain},
        "output stride 16, multi-grid (1, 2, 4)": {"output_stride": 16},
    }
    return [
        (title, summary_of("paper_resnet50", cascade=3, **chosen))
        for title, chosen in choices.items()
    ]


def cascade() -> Picture:
    """block4 to block7: strided, atrous, with a multi-grid."""
    names = {f"block{number}": f"backbone.layer{number}" for number in range(1, 8)}
    return _chains(cascades(), names)


def _chains(rows: Sequence[tuple[str, Summary]], names: dict[str, str]) -> Picture:
    """A chain of blocks a model, one below the other, of the parts that are named."""
    canvas = Canvas(WIDTH, 46 + 200 * len(rows))
    for row, (title, found) in enumerate(rows):
        top = 54 + 200 * row
        canvas.text(MARGIN, top - 30, title, size=17)
        gflop = f"{2 * found.all.macs / 1e9:.0f} GFLOP, {summaries.count(found.params)} parameters"
        canvas.text(WIDTH - MARGIN, top - 30, gflop, size=15, anchor="rm")
        parts = {part.name: part for part in found.parts}
        _chain(canvas, top, [(title, parts[name]) for title, name in names.items()])
    y = 24 + 200 * len(rows)
    canvas.line([(MARGIN, y - 14), (WIDTH - MARGIN, y - 14)], LIGHT)
    key = "darker: larger output stride; framed: atrous; below: size of the map, and side of the "
    canvas.text(MARGIN, y + 4, f"{key}field of view in pixels", size=14, color=GREY)
    return canvas.picture()


def _chain(canvas: Canvas, top: float, blocks: Sequence[tuple[str, ModuleSummary]]) -> None:
    """Boxes as high as their maps' sides, the names above and rates and sizes below."""
    pitch = (WIDTH - 2 * MARGIN) / len(blocks)
    tallest, middle = 82, top + 50
    before: float | None = None
    for place, (title, part) in enumerate(blocks):
        conv = _widest(part)
        left, right = MARGIN + place * pitch + 9, MARGIN + (place + 1) * pitch - 9
        half = max(7.0, tallest / 2 * math.sqrt(conv.out_shape[0] / 257))
        rates = part.rates if any(rate > 1 for rate in part.rates) else ()
        outline, thickness = (VERMILLION, 3.0) if rates else (INK, 1.0)
        if before is not None:
            canvas.line([(before, middle), (left, middle)], GREY)
        before = right
        canvas.box(
            left, middle - half, right, middle + half,
            fill=STRIDE_COLORS[conv.output_stride], outline=outline, thickness=thickness,
        )  # fmt: skip
        x = (left + right) / 2
        canvas.text(x, middle - tallest / 2 - 14, title, size=14, anchor="mm")
        below = middle + tallest / 2 + 14
        side = f"{conv.out_shape[0]}x{conv.out_shape[1]}, sees {_largest_view(part)}"
        canvas.text(x, below, side, size=fitting(side, pitch - 4, 14), anchor="mm", color=GREY)
        if rates:
            text = f"rate{'s' if len(rates) > 1 else ''} {', '.join(map(str, rates))}"
            canvas.text(x, below + 20, text, size=14, anchor="mm", color=VERMILLION)
        elif conv.output_stride != 1:
            text = f"stride {conv.output_stride}"
            canvas.text(x, below + 20, text, size=14, anchor="mm", color=GREY)


def _widest(part: ModuleSummary) -> Convolution:
    """The last convolution that the image was not pooled before."""
    return next(c for c in reversed(part.convolutions) if c.output_stride is not None)


def _largest_view(part: ModuleSummary) -> int:
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


def heads() -> Picture:
    """The heads of the paper, torchvision and DeepLabv3+."""
    canvas = Canvas(WIDTH, 606)
    for row, (title, name, overrides) in enumerate(HEADS):
        top = 26 + 156 * row
        found = summary_of(name, **overrides)
        canvas.text(MARGIN, top, title, size=17)
        about = f"{name}, output stride {found.architecture.output_stride}"
        if found.architecture.aux_head:
            about += "; beside it an auxiliary head on block3: 3x3, logits"
        canvas.text(MARGIN + 200, top + 1, about, size=14, color=GREY)
        _head(canvas, top + 56, head_parts(found))
    return canvas.picture()


def head_parts(found: Summary) -> list[tuple[str, ModuleSummary]]:
    """The convolutions of the main head by step, in the order of execution."""
    steps: dict[str, list[Convolution]] = {}
    for conv in found.all.convolutions:
        key = next((k for k in _NAMES if f"{conv.name}.".startswith(f"{k}.")), None)
        if key is not None:
            steps.setdefault(key, []).append(conv)
    return [(_NAMES[key], ModuleSummary(key, tuple(convs))) for key, convs in steps.items()]


_PITCH, _BOX = 146, 108  # from step to step, and width of a box, pixels


def _head(canvas: Canvas, middle: float, steps: list[tuple[str, ModuleSummary]]) -> None:
    """A box a step from left to right; low-level features come in from below."""
    x = float(MARGIN)
    for place, (name, part) in enumerate(steps):
        if name == LOW_LEVEL:  # between ASPP and what joins both
            before, joined, below = x - _PITCH + _BOX, x + _PITCH - 42, middle + 118
            canvas.arrow((before, middle), (x + _PITCH - 1, middle))
            side = part.convolutions[-1].out_shape[0]
            resized = f"resized to {side}x{side}"
            canvas.text((before + joined) / 2, middle - 14, resized, size=14, anchor="mm")
            left = joined - 22 - _BOX
            _step(canvas, left, below, name, part)
            canvas.line([(left + _BOX, below), (joined, below), (joined, middle)], GREY, 1.2)
        else:
            _step(canvas, x, middle, name, part)
            if name == "logits" or steps[place + 1][0] != LOW_LEVEL:
                canvas.arrow((x + _BOX, middle), (x + _PITCH - 1, middle))
        x += _PITCH
    canvas.text(x + 6, middle, f"resized to {SIZE}x{SIZE}", size=14)


def _step(canvas: Canvas, left: float, middle: float, name: str, part: ModuleSummary) -> None:
    """A box with its name; below it its map and arithmetic."""
    conv, right = _widest(part), left + _BOX
    atrous = any(rate > 1 for rate in part.rates)
    canvas.box(
        left, middle - 22, right, middle + 22,
        fill=STRIDE_COLORS[conv.output_stride],
        outline=VERMILLION if atrous else INK,
        thickness=3.0 if atrous else 1.0,
    )  # fmt: skip
    x = (left + right) / 2
    canvas.text(x, middle - 1, name, size=fitting(name, _BOX - 8, 15), anchor="mm")
    below = ["x".join(map(str, conv.out_shape)), f"{2 * part.macs / 1e9:.2f} GFLOP"]
    lines_of_text(canvas, x, middle + 37, below, size=13, anchor="mm", color=GREY)
