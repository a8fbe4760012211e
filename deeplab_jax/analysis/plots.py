"""Figures of a model: valid taps against the rate, its blocks, what it looks at."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from deeplab_jax.analysis.summary import ModuleSummary, Summary, describe
from deeplab_jax.visualization.canvas import GREY, INK, LIGHT, Canvas, Color, text_width

Picture = UInt8[np.ndarray, "h w 3"]

WIDTH = 1360  # of a figure, pixels
PAPER_MAP = (65, 65)  # of arXiv 1706.05587, figure 4
_TAP_COLORS: dict[int, Color] = {
    1: (190, 40, 50),
    2: (225, 130, 50),
    3: (200, 170, 40),
    4: (60, 150, 75),
    6: (70, 150, 190),
    9: (50, 70, 160),
}
_ATROUS: Color = (200, 80, 20)
_STRIDE_COLORS: dict[int | None, Color] = {
    1: (246, 246, 246),
    2: (228, 238, 248),
    4: (200, 222, 240),
    8: (168, 203, 230),
    16: (130, 180, 218),
    32: (95, 152, 200),
    64: (70, 128, 182),
    128: (52, 106, 162),
    256: (38, 86, 142),
    None: (240, 235, 215),
}


def model_figure(summary: Summary) -> Picture:
    """Valid taps and blocks of a model, one above the other (figures 4, 3 and 5 of the paper)."""
    return np.concatenate([valid_taps_figure(summary), blocks_figure(summary)])


# --- Valid taps --------------------------------------------------------------------------------


def tap_shares(height: int, width: int, rate: int) -> dict[int, float]:
    """Share of a map's pixels at which so many taps of a 3x3 fall on the map (paper, figure 4)."""
    rows, columns = (_taps_along(side, rate) for side in (height, width))
    shares: dict[int, float] = collections.defaultdict(float)
    for down, tall in rows.items():
        for across, wide in columns.items():
            shares[down * across] += tall * wide / (height * width)
    return dict(shares)


def _taps_along(size: int, rate: int) -> collections.Counter[int]:
    """Along one axis: number of taps of three that fall on the map, and of how many pixels."""
    pixels = np.arange(size)
    taps = np.add(
        *((pixels + offset >= 0) & (pixels + offset < size) for offset in (-rate, rate)), dtype=int
    )
    return collections.Counter((1 + taps).tolist())


def valid_taps_figure(summary: Summary) -> Picture:
    """On the paper's map, and on the maps of this model's largest rates, which are marked."""
    last = max(summary.all.convolutions, key=lambda conv: (conv.rate, conv.name))
    own = last.in_shape[:2]
    marked = sorted(
        {c.rate for c in summary.all.convolutions if c.in_shape[:2] == own and c.kernel_size == 3}
    )
    canvas = Canvas(WIDTH, 420)
    canvas.text(24, 24, "Taps of a 3x3 that fall on the map, against the rate", size=18)
    plots = [(PAPER_MAP, [] if own != PAPER_MAP else marked)]
    if own != PAPER_MAP:
        plots.append((own, marked))
    width = (WIDTH - 40) // len(plots)
    for place, ((rows, columns), rates) in enumerate(plots):
        title = f"{rows}x{columns} map" + (
            f", the model's for images of {summary.height}x{summary.width}; rates of its 3x3 dashed"
            if rates
            else ", as in the paper's figure 4"
        )
        _tap_plot(canvas, (20 + place * width, 50, width - 40, 350), (rows, columns), rates, title)
    return canvas.picture()


def _tap_plot(
    canvas: Canvas,
    place: tuple[int, int, int, int],
    map_size: tuple[int, int],
    marked: Sequence[int],
    title: str,
) -> None:
    left, top, width, height = place
    left, top, width, height = left + 46, top + 24, width - 140, height - 74
    bottom, right = top + height, left + width
    last = max(*map_size, *marked, 1) + 1
    curves: dict[int, list[tuple[float, float]]] = collections.defaultdict(list)
    for rate in range(1, last + 1):
        shares = tap_shares(*map_size, rate)
        for taps in _TAP_COLORS:
            x = left + width * rate / last
            curves[taps].append((x, bottom - height * shares.get(taps, 0.0)))
    canvas.text(left, top - 16, title, size=14, color=GREY)
    for tick in range(0, 11, 2):
        y = bottom - height * tick / 10
        canvas.line([(left, y), (right, y)], LIGHT)
        canvas.text(left - 8, y, f"{tick / 10:.1f}", size=12, anchor="rm", color=GREY)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**6) if last / s <= 12)
    for rate in range(0, last + 1, step):
        x = left + width * rate / last
        canvas.line([(x, bottom), (x, bottom + 4)], GREY)
        canvas.text(x, bottom + 14, str(rate), size=12, anchor="mm", color=GREY)
    canvas.text(left + width / 2, bottom + 32, "rate", size=13, anchor="mm")
    for rate in marked:
        x = left + width * rate / last
        canvas.dashed((x, top), (x, bottom), _ATROUS)
    for taps, points in curves.items():
        for above, run in itertools.groupby(
            itertools.pairwise(points), lambda pair: min(y for _, y in pair) < bottom
        ):
            if above:
                ends = list(run)
                canvas.line([ends[0][0], *(end for _, end in ends)], _TAP_COLORS[taps], 2.2)
    canvas.line([(left, top), (left, bottom), (right, bottom)], INK)
    used = [taps for taps, points in curves.items() if any(y < bottom for _, y in points)]
    for row, taps in enumerate(used):
        y = top + 10 + 22 * row
        canvas.line([(right + 12, y), (right + 34, y)], _TAP_COLORS[taps], 3)
        canvas.text(right + 40, y, f"{taps} tap{'s' if taps > 1 else ''}", size=13)


# --- Blocks ------------------------------------------------------------------------------------

_MIDDLE, _TALLEST = 210, 230  # of the chain of blocks, pixels


def blocks_figure(summary: Summary) -> Picture:
    """The blocks from the image to the logits, with output strides and rates."""
    canvas = Canvas(WIDTH, 500)
    canvas.text(24, 24, "From the image to the logits", size=18)
    canvas.text(24, 48, describe(summary.architecture), size=13, color=GREY)
    backbone = _merged([part for part in summary.parts if part.name.startswith("backbone.")])
    head = [
        ModuleSummary(c.name, (c,))
        for c in summary.all.convolutions
        if c.name.startswith("classifier.")
    ]
    branches = [part for part in head if ".branches." in part.name]
    tail = [part for part in head if ".branches." not in part.name]
    pitch = (WIDTH - 40) / (2 + len(backbone) + len(tail))

    def span(column: int) -> tuple[float, float]:
        gap = min(14.0, 0.1 * pitch)
        return 20 + column * pitch + gap, 20 + (column + 1) * pitch - gap

    image = (summary.height, summary.width, summary.architecture.in_channels)
    _block(canvas, span(0), 1.0, _STRIDE_COLORS[1], ["image", _shape(image)])
    for column, part in enumerate(backbone, start=1):
        _arrow(canvas, span(column - 1)[1], span(column)[0])
        _part(canvas, span(column), part, summary)
    column = len(backbone)
    if branches:  # a cascade has none
        column += 1
        _branches(canvas, (span(column - 1)[1], *span(column), span(column + 1)[0]), branches)
    for place, part in enumerate(tail, start=column + 1):
        if place > column + 1 or not branches:
            _arrow(canvas, span(place - 1)[1], span(place)[0])
        _part(canvas, span(place), part, summary)
    _auxiliary(canvas, summary, [(span(c), part) for c, part in enumerate(backbone, start=1)])
    return canvas.picture()


_NUMBERED = re.compile(r"(.*?)(\d+)(?:-\d+)?")  # "backbone.block7", "backbone.block7-12"


def _merged(parts: list[ModuleSummary]) -> list[ModuleSummary]:
    """Neighbours of one name that are numbered, and alike in size and rates, as one part."""
    merged: list[ModuleSummary] = []
    for part in parts:
        before = merged[-1] if merged else None
        first, last = (_NUMBERED.fullmatch(p.name) if p else None for p in (before, part))
        if before and first and last and first[1] == last[1] and _kind(before) == _kind(part):
            name = f"{first[1]}{first[2]}-{last[2]}"
            merged[-1] = ModuleSummary(name, before.convolutions + part.convolutions)
        else:
            merged.append(part)
    return merged


def _kind(part: ModuleSummary) -> tuple[int | None, tuple[int, ...]]:
    return part.convolutions[-1].output_stride, tuple(sorted(set(part.rates)))


def _part(canvas: Canvas, span: tuple[float, float], part: ModuleSummary, summary: Summary) -> None:
    last = part.convolutions[-1]
    count, kernels = len(part.convolutions), sorted({c.kernel_size for c in part.convolutions})
    what = f"{count} convolutions" if count > 1 else f"{kernels[0]}x{kernels[0]}"
    lines = [
        part.name.removeprefix("backbone.").removeprefix("classifier.").removesuffix(".conv"),
        _shape(last.out_shape),
        what,
        f"output stride {last.output_stride or '-'}",
        f"sees {last.field_of_view} px",
    ]
    if part.rates:
        lines.append(f"rate {', '.join(map(str, part.rates))}")
    share = math.sqrt(last.out_shape[0] / summary.height)
    atrous = any(rate > 1 for rate in part.rates)
    _block(canvas, span, share, _STRIDE_COLORS[last.output_stride], lines, atrous=atrous)


def _block(
    canvas: Canvas,
    span: tuple[float, float],
    share: float,
    fill: Color,
    lines: list[str],
    *,
    atrous: bool = False,
) -> None:
    """A box with its name above and its facts below; the rate, last, in the boxes' colour."""
    (left, right), half = span, max(10.0, share * _TALLEST / 2)
    outline, thickness = (_ATROUS, 2.5) if atrous else (INK, 1.0)
    top, bottom = _MIDDLE - half, _MIDDLE + half
    canvas.box(left, top, right, bottom, fill=fill, outline=outline, thickness=thickness)
    name, *facts = lines
    room = right - left + 10
    canvas.text((left + right) / 2, top - 14, name, size=_fit(name, room, 13), anchor="mm")
    for row, fact in enumerate(facts):
        color = _ATROUS if atrous and fact.startswith("rate") else GREY
        y = _MIDDLE + _TALLEST / 2 + 18 + 19 * row
        canvas.text(
            (left + right) / 2, y, fact, size=_fit(fact, room, 13), anchor="mm", color=color
        )


def _branches(
    canvas: Canvas, xs: tuple[float, float, float, float], branches: list[ModuleSummary]
) -> None:
    """ASPP: its branches one above the other, between the features and what joins them."""
    before, left, right, after = xs
    height = 1.0 * _TALLEST / len(branches)
    for row, part in enumerate(branches):
        conv = part.convolutions[0]
        y = _MIDDLE + (row - (len(branches) - 1) / 2) * height
        pooled = conv.output_stride is None
        atrous = conv.rate > 1
        canvas.box(
            left, y - 0.36 * height, right, y + 0.36 * height,
            fill=_STRIDE_COLORS[conv.output_stride],
            outline=_ATROUS if atrous else INK,
            thickness=2.5 if atrous else 1.0,
        )  # fmt: skip
        side = f"{conv.kernel_size}x{conv.kernel_size}"
        label = "image pooling" if pooled else side + (f" rate {conv.rate}" if atrous else "")
        size = _fit(label, right - left - 6, 13)
        canvas.text((left + right) / 2, y, label, size=size, anchor="mm")
        canvas.line([(before, _MIDDLE), (left, y)], GREY)
        canvas.line([(right, y), (after, _MIDDLE)], GREY)
    canvas.text((left + right) / 2, _MIDDLE - _TALLEST / 2 - 14, "ASPP", size=13, anchor="mm")
    for row, part in enumerate(p for p in branches if p.convolutions[0].kernel_size > 1):
        conv = part.convolutions[0]
        fact = f"rate {conv.rate}: {100 * conv.valid_share:.0f} % of taps"
        y = _MIDDLE + _TALLEST / 2 + 18 + 19 * row
        size = _fit(fact, right - left + 20, 13)
        canvas.text((left + right) / 2, y, fact, size=size, anchor="mm", color=_ATROUS)


def _auxiliary(
    canvas: Canvas, summary: Summary, blocks: list[tuple[tuple[float, float], ModuleSummary]]
) -> None:
    """The head on features before the last, below the block whose features it reads."""
    head = [c for c in summary.all.convolutions if c.name.startswith("aux_classifier.")]
    if not head:
        return
    (left, right), _ = next(
        block
        for block in reversed(blocks)
        if block[1].convolutions[-1].out_shape == head[0].in_shape
    )
    x, top = (left + right) / 2, _MIDDLE + _TALLEST / 2 + 18 + 19 * 5
    canvas.line([(x, top - 4), (x, top + 18)], GREY)
    kernels = ", ".join(f"{c.kernel_size}x{c.kernel_size}" for c in head)
    label = f"auxiliary head: {kernels}, sees {head[-1].field_of_view} px"
    half = text_width(label, 13) / 2 + 10
    canvas.box(x - half, top + 18, x + half, top + 44, fill=_STRIDE_COLORS[head[0].output_stride])
    canvas.text(x, top + 31, label, size=13, anchor="mm")


def _arrow(canvas: Canvas, left: float, right: float) -> None:
    canvas.line([(left, _MIDDLE), (right, _MIDDLE)], GREY)


def _fit(text: str, room: float, size: int) -> int:
    """The size of letters, at most `size`, at which a text is no longer than the room."""
    while size > 8 and text_width(text, size) > room:
        size -= 1
    return size


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
