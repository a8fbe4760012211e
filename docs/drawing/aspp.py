"""Section 6 of the guide: ASPP, the taps that fall on the map, and what the logits depend on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from deeplab_jax.analysis import summary as summaries
from deeplab_jax.analysis.plots import model_figure
from deeplab_jax.analysis.receptive_field import SHARE, EffectiveField, effective_field
from deeplab_jax.models.architecture import Architecture, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.models.ops.atrous_conv import atrous_conv
from deeplab_jax.visualization.canvas import (
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Canvas,
    Color,
)
from drawing.network import SIZE, summary_of
from drawing.sheet import (
    MARGIN,
    STRIDE_COLORS,
    WIDTH,
    Picture,
    colored,
    enlarged,
    framed,
    lines_of_text,
    polyline_arrow,
    viridis,
)

TAP_COLORS: dict[int, Color] = {
    1: VERMILLION, 2: PURPLE, 3: PURPLE, 4: ORANGE, 6: SKY, 9: (0, 72, 128)
}  # fmt: skip


def valid_taps(side: int, rate: int) -> Int[np.ndarray, "side side"]:
    """Number of taps of a 3x3 that fall on the map, at each position: a convolution of ones."""
    ones = jnp.ones((1, side, side, 1))
    found = atrous_conv(ones, jnp.ones((3, 3, 1, 1)), kernel_dilation=rate, method="native")
    return np.rint(np.asarray(found))[0, :, :, 0].astype(int)


def aspp() -> Picture:
    """ASPP's branches, and where their taps fall on the map."""
    found = summary_of("paper_resnet50")
    convs = [c for c in found.all.convolutions if c.name.startswith("classifier.")]
    branches = [c for c in convs if ".branches." in c.name]
    project, logits = convs[len(branches) :]
    canvas = Canvas(WIDTH, 552)
    pitch, top, side = 102, 14, 33
    x_box, x_map, x_text, x_join = 214, 396, 482, 672
    middle = top + pitch * (len(branches) - 1) / 2 + 40
    _box(canvas, (MARGIN, middle), 126, ("features of block4", _shape(branches[0].in_shape)), 16)
    turn = x_box - 26
    for row, conv in enumerate(branches):
        y = top + pitch * row + 40
        polyline_arrow(canvas, [(MARGIN + 126, middle), (turn, middle), (turn, y), (x_box - 1, y)])
        pooled = conv.output_stride is None
        name = "image pooling" if pooled else f"3x3 rate {conv.rate}"
        title = name if conv.kernel_size > 1 or pooled else "1x1"
        lines = (title, "mean, then 1x1") if pooled else (title,)
        _box(canvas, (x_box, y), 140, lines, conv.output_stride, atrous=conv.rate > 1)
        canvas.line([(x_box + 140, y), (x_join, y)], GREY, 1.2)
        if conv.kernel_size > 1:
            taps = valid_taps(side, conv.rate)
            framed(canvas, enlarged(colored(taps, TAP_COLORS), 2), x_map, round(y) - side)
            share = f"{100 * conv.valid_share:.1f} % of taps"
        else:
            share = "sees the whole image" if pooled else ""
        # Above the line that passes and below it.
        told = f"{summaries.count(conv.params)} parameters"
        work = f"{2 * conv.macs / 1e9:.3f} GFLOP"
        canvas.text(x_text, y - 12, share or work, size=14)
        lines_of_text(
            canvas, x_text, y + 14, [work, told] if share else [told], size=13, color=GREY
        )
    _box(canvas, (x_join, middle), 88, ("joined,", "1x1"), 16, tall=4 * pitch + 52)
    canvas.arrow((x_join + 88, middle), (x_join + 117, middle))
    _box(canvas, (x_join + 118, middle), 88, ("1x1", "logits"), 16)
    below = [_shape(logits.out_shape)]
    lines_of_text(canvas, x_join + 162, middle + 42, below, size=13, anchor="mm", color=GREY)
    width = f"{project.in_shape[2]} to {project.out_shape[2]}"
    canvas.text(x_join + 44, middle + 40, width, size=13, anchor="mm", color=GREY)
    y = top + pitch * len(branches) + 8
    canvas.text(MARGIN, y, f"taps of nine on the {side}x{side} map:", size=14)
    for place, number in enumerate((9, 6, 4, 2, 1)):
        x = 268 + 66 * place
        canvas.box(x, y - 7, x + 14, y + 7, fill=TAP_COLORS[number])
        canvas.text(x + 21, y, str(number), size=14)
    return canvas.picture()


def model() -> Picture:
    """Valid taps by rate, and blocks: `summary --plot`."""
    return model_figure(summary_of("paper_resnet50"))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _box(
    canvas: Canvas,
    place: tuple[float, float],
    width: float,
    lines: tuple[str, ...],
    stride: int | None,
    *,
    atrous: bool = False,
    tall: float = 56,
) -> None:
    """A box from its left side's middle on, with lines of text in it."""
    left, middle = place
    canvas.box(
        left, middle - tall / 2, left + width, middle + tall / 2,
        fill=STRIDE_COLORS[stride],
        outline=VERMILLION if atrous else INK,
        thickness=3.0 if atrous else 1.0,
    )  # fmt: skip
    first = middle - 10 * (len(lines) - 1)
    lines_of_text(canvas, left + width / 2, first, lines, size=14, anchor="mm")


# --- The effective receptive field -------------------------------------------------------------

_SHRINK, _FACTOR = 4, 2  # pixels of the image a value, and of a panel a value


def fields() -> list[tuple[tuple[str, str], Architecture]]:
    """What is compared: the same random parameters without rates, and without image pooling."""
    model = architecture("paper_resnet18", num_classes=21)
    no_pooling = dataclasses.replace(model, image_pooling=False)
    return [
        (
            ("ASPP rates 1, 1, 1", "no image pooling"),
            dataclasses.replace(no_pooling, atrous_rates=(1, 1, 1)),
        ),
        (("ASPP rates 6, 12, 18", "no image pooling"), no_pooling),
        (("ASPP rates 6, 12, 18", "and image pooling"), model),
    ]


def receptive_field() -> Picture:
    """What the logits depend on, by ASPP's rates and pooling."""
    canvas = Canvas(WIDTH, 436)
    side = SIZE // _SHRINK * _FACTOR
    for column, (title, model) in enumerate(fields()):
        left, top = MARGIN + column * 296, 66
        variables = jax.jit(FunctionalModel(model).init)(jax.random.key(0))
        field = effective_field(model, variables, SIZE, SIZE, samples=4)
        for row, text in enumerate(title):
            canvas.text(left, 24 + 21 * row, text, size=(16, 14)[row], color=(INK, GREY)[row])
        framed(canvas, _panel(field), left, top)
        scale = _FACTOR / _SHRINK
        half = field.side() / 2 * scale
        x, y = (left + field.centre[1] * scale, top + field.centre[0] * scale)
        canvas.box(x - half, y - half, x + half, y + half, outline=(255, 255, 255), thickness=1.6)
        told = (
            f"{100 * SHARE:g} % within {field.side()} px, half",
            f"within {field.side(0.5)}; field of view {field.theoretical}",
        )
        lines_of_text(canvas, left, top + side + 22, told)
    bar = viridis(np.tile(np.linspace(0, 1, 240), (14, 1)))
    framed(canvas, bar, MARGIN, 402)
    text = (
        "gradient of the logits, its square root, from 0 to the panel's largest; framed: 95 % of it"
    )
    canvas.text(MARGIN + 256, 409, text, size=14, color=GREY)
    return canvas.picture()


def _panel(field: EffectiveField) -> Picture:
    """The energy summed over squares of pixels, on a square root scale to its own maximum."""
    side = SIZE // _SHRINK
    energy = field.energy[: side * _SHRINK, : side * _SHRINK]
    summed = energy.reshape(side, _SHRINK, side, _SHRINK).sum((1, 3))
    return enlarged(viridis(np.sqrt(summed / summed.max())), _FACTOR)
