"""Figures of a model: valid taps by atrous rate, its blocks, and its effective receptive field."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from deeplab_jax.analysis.receptive_field import ENERGY_FRACTION, EffectiveField
from deeplab_jax.analysis.summary import ModuleSummary, Summary, describe
from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import GREY, INK, LIGHT, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER_MAP = (65, 65)  # height and width of the map in arXiv 1706.05587, figure 4
_COLORS = (VERMILLION, plots.ORANGE, plots.PURPLE, plots.GREEN, plots.SKY, plots.BLUE)
_TAP_COLORS = dict(zip((1, 2, 3, 4, 6, 9), _COLORS, strict=True))

# Layout of the model's figure, in the units of `plots.diagram`.
_MARGIN, _HEADER, _PITCH = 20, 126, 94  # widths: of the margin, of the table's header, of a block
_TAPS_HEIGHT = 350
_MIDDLE, _TALLEST, _ROW = 190, 210, 24  # of the chain of blocks, and of the table below


def model_figure(summary: Summary) -> Figure:
    """Draws valid taps by rate, and the blocks below (the paper's figures 4, and 3 and 5)."""
    columns = _columns(summary)
    width = max(plots.WIDTH, 2 * _MARGIN + _HEADER + sum(map(_column_width, columns)))
    has_auxiliary = any(part.name.startswith("aux_classifier.") for part in summary.parts)
    height = _MIDDLE + _TALLEST / 2 + 22 + len(_ROWS) * _ROW + (44 if has_auxiliary else 10)
    figure, axes = plots.diagram(width, _TAPS_HEIGHT + height)
    _draw_valid_taps(axes, summary)
    _draw_blocks(axes, summary, columns, _TAPS_HEIGHT)
    return figure


# --- Valid taps --------------------------------------------------------------------------------


def tap_fractions(height: int, width: int, rate: int) -> dict[int, float]:
    """Computes how many taps of a 3x3 convolution fall on the map (the paper's figure 4).

    Returns:
      Number of taps -> fraction of the map's positions with as many, 0..1.
    """
    # Fractions of rows and of columns by how many of the three taps fall on the map.
    rows, columns = (
        np.bincount(1 + (pixels >= rate).astype(int) + (pixels < len(pixels) - rate), minlength=4)
        / len(pixels)
        for pixels in map(np.arange, (height, width))
    )
    taps = np.outer(range(4), range(4)).ravel()
    fractions = np.bincount(taps, np.outer(rows, columns).ravel())
    return {number: float(fraction) for number, fraction in enumerate(fractions) if fraction}


def _draw_valid_taps(axes: Axes, summary: Summary) -> None:
    """On the paper's map, and on the map of this model's largest rate, with its rates marked."""
    largest = max(summary.all.convolutions, key=lambda conv: (conv.rate, conv.name))
    own = largest.in_shape[:2]
    rates = sorted(
        {c.rate for c in summary.all.convolutions if c.in_shape[:2] == own and c.kernel_size == 3}
    )
    plots.text(axes, _MARGIN, 24, "Taps of a 3x3 convolution that fall on the map", size=13)
    size = f"the model's map for an image of {summary.height}x{summary.width}"
    charts = [(own, rates, f"{size}\ndashed: rates of its 3x3 convolutions")]
    if own != PAPER_MAP:
        charts.insert(0, (PAPER_MAP, [], "as in the paper's figure 4"))
    pitch = (axes.get_xlim()[1] - 2 * _MARGIN) / len(charts)
    for index, (map_size, marked, title) in enumerate(charts):
        left = _MARGIN + 48 + index * pitch
        chart = plots.chart_axes(axes, left, 92, min(pitch - 146, 500), 200)
        _draw_tap_chart(chart, map_size, marked)
        title = f"{_shape(map_size)}: {title}"
        chart.set_title(title, fontsize=9.5, color=GREY, loc="left", linespacing=1.4)


def _draw_tap_chart(chart: Axes, map_size: tuple[int, int], marked: Sequence[int]) -> None:
    rates = range(1, max(*map_size, *marked, 1) + 2)
    by_rate = [tap_fractions(*map_size, rate) for rate in rates]
    for rate in marked:
        chart.axvline(rate, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
    for taps, color in _TAP_COLORS.items():
        values = np.array([fractions.get(taps, 0.0) for fractions in by_rate])
        if values.any():
            # A curve ends at the first 0 on each side.
            shown = (values > 0) | (np.roll(values, 1) > 0) | (np.roll(values, -1) > 0)
            label = f"{taps} tap{'s' if taps > 1 else ''}"
            chart.plot(rates, np.where(shown, values, np.nan), color=color, label=label)
    chart.set(xlim=(0, rates[-1]), ylim=(0, 1.02))
    chart.set_xlabel("atrous rate, pixels of the map", fontsize=9.5, color=INK)
    chart.set_ylabel("fraction of positions", fontsize=9.5, color=INK)
    plots.clean_axes(chart)
    chart.legend(
        loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9.5, labelcolor="linecolor"
    )


# --- Blocks ------------------------------------------------------------------------------------

_Column = ModuleSummary | None  # convolutions that are drawn as one column; None: the image
_ASPP = "classifier.aspp.branches"
_ROWS = (
    *("map", "convolutions", "output stride", "field of view, px"),
    *("atrous rates", "valid taps, %"),
)
_NUMBERED = re.compile(r"(.*?)(\d+)(?:-\d+)?")  # "backbone.block7", "backbone.block7-12"


def _is_aspp(column: _Column) -> bool:
    return column is not None and column.name == _ASPP


def _columns(summary: Summary) -> list[_Column]:
    """The image, the backbone's parts, and the head's convolutions with ASPP's branches as one.

    Numbered neighbours of the backbone of one name, output stride and rates are one part.
    """
    backbone: list[ModuleSummary] = []
    for part in summary.parts:
        if not part.name.startswith("backbone."):
            continue
        before = backbone[-1] if backbone else part
        first, last = (_NUMBERED.fullmatch(p.name) for p in (before, part))
        if (
            before is not part
            and first
            and last
            and first[1] == last[1]
            and _kind(before) == _kind(part)
        ):
            name = f"{first[1]}{first[2]}-{last[2]}"
            backbone[-1] = ModuleSummary(name, before.convolutions + part.convolutions)
        else:
            backbone.append(part)
    head = [c for c in summary.all.convolutions if c.name.startswith("classifier.")]
    grouped = itertools.groupby(head, lambda c: _ASPP if c.name.startswith(_ASPP) else c.name)
    return [None, *backbone, *(ModuleSummary(name, tuple(convs)) for name, convs in grouped)]


def _kind(part: ModuleSummary) -> tuple[int | None, set[int]]:
    return part.convolutions[-1].output_stride, set(part.rates)


def _column_width(column: _Column) -> float:
    return _PITCH * (1.3 if _is_aspp(column) else 1)


def _draw_blocks(axes: Axes, summary: Summary, columns: list[_Column], top: float) -> None:
    """The blocks from the image to the logits, above a table of their facts."""
    width = axes.get_xlim()[1]
    plots.text(axes, _MARGIN, top + 16, "From the image to the logits", size=13)
    about = describe(summary.architecture)
    plots.text(axes, _MARGIN, top + 42, about, color=GREY, max_width=width - 2 * _MARGIN)
    middle = top + _MIDDLE
    rows = [middle + _TALLEST / 2 + 30 + _ROW * row for row in range(len(_ROWS))]
    for y, header in zip(rows, _ROWS, strict=True):
        plots.arrow(axes, [(_MARGIN, y - 14), (width - _MARGIN, y - 14)], head=False, color=LIGHT)
        plots.text(axes, _MARGIN, y, header, size=9.5)
    x = float(_MARGIN + _HEADER)
    scale = (width - x - _MARGIN) / sum(map(_column_width, columns))
    outputs: list[plots.Point] = []  # right ends of the boxes before
    for column in columns:
        pitch = scale * _column_width(column)
        heights = _draw_column(axes, summary, column, (x + 9, middle), pitch - 18)
        for start, height in itertools.product(outputs, heights):
            plots.arrow(axes, [start, (x + 9, height)], head=False)
        outputs = [(x + pitch - 9, height) for height in heights]
        atrous = column is not None and _is_atrous(column)
        for y, header, cell in zip(rows, _ROWS, _facts(summary, column), strict=False):
            color = VERMILLION if atrous and header == "atrous rates" else GREY
            style: dict[str, Any] = {"color": color, "ha": "center", "max_width": pitch - 8}
            plots.text(axes, x + pitch / 2, y, cell, size=9.5, **style)
        x += pitch
    head = [c for c in summary.all.convolutions if c.name.startswith("aux_classifier.")]
    if head:
        kernels = ", ".join(f"{c.kernel_size}x{c.kernel_size}" for c in head)
        sources = [
            f" on {part.name.removeprefix('backbone.')}"
            for part in summary.parts
            if part.name.startswith("backbone.")
            and part.convolutions[-1].out_shape == head[0].in_shape
        ]
        source = sources[-1] if sources else ""
        view = head[-1].field_of_view
        words = f"auxiliary head{source}: {kernels}, field of view {view} px"
        plots.text(axes, _MARGIN, rows[-1] + 30, words)


def _facts(summary: Summary, column: _Column) -> list[str]:
    """The cells of the table, in the order of `_ROWS`."""
    if column is None:
        return [_shape((summary.height, summary.width, summary.architecture.in_channels))]
    convs, last = column.convolutions, column.convolutions[-1]
    views = [conv.field_of_view for conv in convs if conv.field_of_view is not None]
    strides = [conv.output_stride for conv in convs if conv.output_stride is not None]
    valid = [100 * column.valid_macs / column.macs]
    if _is_aspp(column):
        last = convs[0]
        valid = [100 * conv.valid_fraction for conv in convs if conv.kernel_size > 1]
    return [
        _shape(last.out_shape),
        str(len(convs)) if len(convs) > 1 else f"{last.kernel_size}x{last.kernel_size}",
        str(strides[-1]) if strides else "-",
        str(max(views)) if views else "image",
        ", ".join(map(str, column.rates)) or "-",
        ", ".join(f"{value:.0f}" for value in valid),
    ]


def _draw_column(
    axes: Axes, summary: Summary, column: _Column, left_middle: plots.Point, width: float
) -> list[float]:
    """A box as high as its map, or a box for each branch of ASPP; returns their heights."""
    left, middle = left_middle
    x = left + width / 2
    title: dict[str, Any] = {"size": 9.5, "ha": "center", "va": "bottom", "spacing": 1.2}
    title["max_width"] = width + 14
    if column is not None and _is_aspp(column):
        plots.text(axes, x, middle - _TALLEST / 2 - 7, "ASPP", **title)
        pitch = _TALLEST / len(column.convolutions)
        heights = []
        for index, conv in enumerate(column.convolutions):
            label = f"{conv.kernel_size}x{conv.kernel_size}"
            if conv.output_stride is None:
                label = "image pooling"
            elif conv.rate > 1:
                label += f" rate {conv.rate}"
            branch = ModuleSummary(conv.name, (conv,))
            top = middle - _TALLEST / 2 + (index + 0.14) * pitch
            draw_part(axes, branch, left, top, width, 0.72 * pitch, label, size=9.5)
            heights.append(top + 0.36 * pitch)
        return heights
    height, name = float(_TALLEST), "image"
    if column is not None:
        ratio = column.convolutions[-1].out_shape[0] / summary.height
        height = max(20, _TALLEST * math.sqrt(ratio))
        name = column.name.split(".", 1)[1].removesuffix(".conv").replace(".", ".\n")
    draw_part(axes, column, left, middle - height / 2, width, height)
    plots.text(axes, x, middle - height / 2 - 7, name, **title)
    return [middle]


def draw_part(
    axes: Axes,
    part: ModuleSummary | None,
    left: float,
    top: float,
    width: float,
    height: float,
    words: str = "",
    size: float = 10,
) -> None:
    """Draws a box for a part of a model in a diagram; None: for the image.

    The larger the output stride, the darker is the box. A thick edge means a rate above 1.
    """
    from matplotlib.colors import to_hex, to_rgb

    fill = "#f0ebd7"  # after pooling to one pixel
    stride = 1 if part is None else part.convolutions[-1].output_stride
    if stride is not None:
        darkness = 0.05 + 0.115 * math.log2(stride)
        red, green, blue = (1 - darkness * (1 - part) for part in to_rgb("#3c7cb8"))
        fill = to_hex((red, green, blue))
    edge, line = (VERMILLION, 2.2) if part is not None and _is_atrous(part) else (INK, 0.8)
    place = left, top, width, height
    plots.box(axes, *place, words, fill=fill, edge=edge, line=line, size=size)


def _is_atrous(part: ModuleSummary) -> bool:
    return any(rate > 1 for rate in part.rates)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# --- The effective receptive field -------------------------------------------------------------

_CELLS = 128  # of a panel's longer side at most; more pixels are averaged


def field_facts(field: EffectiveField) -> list[str]:
    """Describes a field in short lines."""
    facts = [
        f"{100 * fraction:g} % of the energy within {field.side(fraction)} px"
        for fraction in (ENERGY_FRACTION, 0.5)
    ]
    facts.append(f"theoretical field of view {field.theoretical} px")
    return [*facts, "and the whole image, by pooling"] if field.sees_image else facts


def field_figure(fields: Sequence[tuple[str, EffectiveField]], title: str) -> Figure:
    """Draws named effective receptive fields of one size, each relative to its own maximum.

    The frame in a panel is the smallest square around the centre that holds `ENERGY_FRACTION` of
    the energy. The colour scale is a square root, so that small values can be seen.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    rows, columns = fields[0][1].energy.shape
    factor = -(-max(rows, columns) // _CELLS)
    scale = 250 / max(rows, columns)
    width, height = columns * scale, rows * scale
    pitch, top = 290, 100
    total = 50 + max(3, len(fields)) * pitch
    figure, sheet = plots.diagram(total, top + height + 190)
    plots.text(sheet, _MARGIN, 26, title, size=13, max_width=total - 2 * _MARGIN)
    # 64 colours look smooth and keep files small.
    norm, colors = PowerNorm(0.5, vmin=0, vmax=1), colormaps["viridis"].resampled(64)
    for index, (name, field) in enumerate(fields):
        left = 55 + index * pitch
        axes = plots.chart_axes(sheet, left, top, width, height)
        plots.text(sheet, left, top - 12, name.replace(", ASPP", "\nASPP"), va="bottom")
        small = (-(-columns // factor), -(-rows // factor))
        energy = cv2.resize(field.energy, small, interpolation=cv2.INTER_AREA)
        extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
        image = axes.imshow(energy / energy.max(), norm=norm, cmap=colors, extent=extent)
        half = field.side() / 2
        corner = field.centre[1] - half, field.centre[0] - half
        frame = Rectangle(corner, 2 * half, 2 * half, fill=False, edgecolor="white", linewidth=1.2)
        axes.add_patch(frame)
        plots.clean_axes(axes, grid="")
        axes.locator_params(nbins=4, integer=True)
        if index == 0:
            axes.set_ylabel("pixels", fontsize=9, color=GREY)
        facts = "\n".join(field_facts(field))
        plots.text(sheet, left, top + height + 34, facts, size=9, va="top", color=GREY)
    bar = plots.chart_axes(sheet, 55, top + height + 135, 320, 12)
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    figure.colorbar(image, cax=bar, orientation="horizontal", ticks=ticks, format="%g")
    plots.clean_axes(bar, grid="")
    words = "mean absolute gradient of the logits at the centre,\nrelative to the panel's maximum"
    plots.text(sheet, 400, top + height + 141, words, size=9)
    return figure
