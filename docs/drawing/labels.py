"""Sections 1 and 2 of the guide: labels and mIoU, what a stride loses, two ways of upsampling."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import ndimage

from deeplab_jax.config import DataConfig, ShapesConfig
from deeplab_jax.data.dataset import Example
from deeplab_jax.data.datasets import shapes
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.evaluation.confusion import confusion_matrix, scores
from deeplab_jax.models.decoders import TransposedDecoder
from deeplab_jax.models.ops.resize import bilinear_matrix
from deeplab_jax.visualization import plots
from deeplab_jax.visualization.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
)
from drawing.sheet import MARGIN, WHITE, colored, grid_lines, viridis

Ids = UInt8[np.ndarray, "h w"]

NUM_CLASSES = shapes.LABELS.num_classes
NAMES = shapes.LABELS.names
COLORS = {**dict(enumerate([INK, YELLOW, SKY, GREEN, PURPLE])), IGNORE: WHITE}

SIZE, NUM_IMAGES = 193, 20  # of the measurement: side of an image in pixels, and images

# The worked example: classes 0, 1 and 2, and a pixel that does not count.
TRUTH: Ids = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, IGNORE, 2, 2], [0, 2, 2, 2]], np.uint8)
PREDICTED: Ids = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 0, 2]], np.uint8)


@functools.cache
def images() -> list[Example]:
    """The first images of the generated data set's val split."""
    config = DataConfig(name="shapes", shapes=ShapesConfig(size=SIZE, num_eval=NUM_IMAGES))
    source = shapes.load(config, "val").source
    return [source[index] for index in range(len(source))]


# --- Segmentation ------------------------------------------------------------------------------


def segmentation() -> Figure:
    """An image, its labels, and mIoU on a map of 4x4 pixels."""
    figure, axes = plots.diagram(plots.WIDTH, 350)
    example = images()[_EXAMPLE]
    top, label = 48, example["label"]
    for column, (title, pixels) in enumerate(
        [("image", example["image"]), ("label map", colored(label, COLORS))]
    ):
        left = MARGIN + column * (SIZE + 24)
        plots.text(axes, left, 24, title, size=12)
        plots.picture(axes, pixels, left, top)
    names = {index: "ignored" if index == IGNORE else NAMES[index] for index in np.unique(label)}
    entries = [(COLORS[index], name) for index, name in names.items()]
    plots.legend(axes, MARGIN, top + SIZE + 26, entries[:3])
    plots.legend(axes, MARGIN, top + SIZE + 52, entries[3:])
    left, side = 490, 44
    for column, (title, ids) in enumerate([("labels", TRUTH), ("predicted", PREDICTED)]):
        x = left + column * (4 * side + 36)
        plots.text(axes, x, 24, title, size=12)
        _draw_ids(axes, x, top, ids, side)
    for row, (words, result) in enumerate(_worked_example()):
        y = top + 4 * side + 28 + 24 * row
        plots.text(axes, left, y, words)
        plots.text(axes, left + 4 * side + 46, y, result)
    return figure


def _worked_example() -> list[tuple[str, str]]:
    """For each class: its pixels in both maps over those in at least one. Then the mean."""
    matrix = confusion_matrix(TRUTH, PREDICTED, 3)
    result = scores(matrix)
    lines = []
    for index in range(3):
        both, either = matrix[index, index], matrix[index].sum() + matrix[:, index].sum()
        ratio = f"{both} / {either - both} = {100 * result.per_class_iou[index]:.1f} %"
        lines.append((f"IoU of class {index}: both / either", ratio))
    return [*lines, ("mIoU: mean of the three", f"{100 * result.miou:.1f} %")]


def _draw_ids(axes: Axes, left: float, top: float, ids: Ids, side: float) -> None:
    """A small map with its ids written in and wrong pixels framed."""
    plots.picture(axes, colored(ids, COLORS), left, top, side)
    grid_lines(axes, left, top, ids.shape, side)
    for (row, column), index in np.ndenumerate(ids):
        x, y = left + side * column, top + side * row
        color = WHITE if index == 0 else INK
        words = "-" if index == IGNORE else str(index)
        plots.text(axes, x + side / 2, y + side / 2, words, size=12, ha="center", color=color)
        if index != TRUTH[row, column] and TRUTH[row, column] != IGNORE:
            plots.box(axes, x + 3, y + 3, side - 6, side - 6, edge=VERMILLION, line=2.4)


# --- What a stride loses -----------------------------------------------------------------------

_EXAMPLE = 15  # an image of three classes
STRIDES = (4, 8, 16, 32)
METHODS = ("nearest", "bilinear", "fractions", "grid")


@functools.cache
def whole_label(index: int) -> Ids:
    """Fills each ignored pixel of an image's label with the nearest class."""
    label = images()[index]["label"]
    _, (rows, columns) = ndimage.distance_transform_edt(label == IGNORE, return_indices=True)
    return label[rows, columns]


def centres(size: int, side: int) -> Int[np.ndarray, " side"]:
    """Lists the pixels at the centres of `side` equal cells of `size` pixels."""
    return np.floor((np.arange(side) + 0.5) * size / side).astype(int)


def through_stride(label: Ids, stride: int, method: str) -> Ids:
    """Downsamples a label by a stride and upsamples it again.

    Args:
      label: without ignored pixels, square.
      stride: pixels.
      method: "nearest": the ids at the cells' centres, repeated. "bilinear": scores of 0 and 1 for
        these ids, resized as logits are. "fractions": scores equal to the fraction of its cell
        that a class covers. "grid": as "bilinear", for the ids at the pixels 0, `stride`,
        2 `stride` and so on.
    """
    size = label.shape[0]
    side = -(-size // stride)
    at = np.arange(side) * stride if method == "grid" else centres(size, side)
    small = label[np.ix_(at, at)]
    if method == "nearest":
        near = centres(side, size)
        return small[np.ix_(near, near)]
    if method == "fractions":
        cells = _cell_means(size, side)
        scores_of_cells = cells @ _one_hot(label) @ cells.T
    else:
        scores_of_cells = _one_hot(small)
    resize = bilinear_matrix(size, side).astype(np.float32)
    return np.argmax(resize @ scores_of_cells @ resize.T, axis=0).astype(np.uint8)


def _one_hot(ids: Ids) -> Float32[np.ndarray, "classes h w"]:
    return (ids == np.arange(NUM_CLASSES)[:, None, None]).astype(np.float32)


def _cell_means(size: int, side: int) -> Float32[np.ndarray, "side size"]:
    """The matrix that averages `size` pixels over each of `side` equal cells."""
    edges = np.arange(side + 1) * size / side
    pixels = np.arange(size)
    upper = np.minimum(edges[1:, None], pixels + 1)
    lower = np.maximum(edges[:-1, None], pixels)
    return (np.clip(upper - lower, 0, None) * side / size).astype(np.float32)


@functools.cache
def best_miou(stride: int, method: str) -> float:
    """mIoU in percent, over the images, of their labels after `through_stride`."""
    matrix = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for index in range(NUM_IMAGES):
        ids = through_stride(whole_label(index), stride, method)
        matrix += confusion_matrix(images()[index]["label"], ids, NUM_CLASSES)
    return 100 * scores(matrix).miou


def strides() -> Figure:
    """Labels after strides of 8, 16 and 32, upsampled again."""
    figure, axes = plots.diagram(plots.WIDTH, 530)
    label, whole = images()[_EXAMPLE]["label"], whole_label(_EXAMPLE)
    pitch, top = SIZE + 24, 48
    small = whole[np.ix_(*2 * [centres(SIZE, -(-SIZE // 16))])]
    panels = [[("label map", colored(label, COLORS))]]
    panels.append([("at stride 16", colored(small, COLORS))])
    wrong_color = {**COLORS, _WRONG: VERMILLION}
    for row, (method, words) in enumerate(
        [("nearest", "nearest ids"), ("bilinear", "bilinear scores")]
    ):
        for stride in STRIDES[1:]:
            ids = through_stride(whole, stride, method)
            wrong = (ids != label) & (label != IGNORE)
            pixels = colored(np.where(wrong, _WRONG, ids), wrong_color)
            panels[row].append((f"stride {stride}, {words}", pixels))
    for row, column in np.ndindex(2, 4):
        title, pixels = panels[row][column]
        left, y = MARGIN + column * pitch, top + row * (SIZE + 52)
        plots.text(axes, left, y - 18, title)
        plots.picture(axes, pixels, left, y, SIZE / pixels.shape[0])
    entry = VERMILLION, "wrong pixels; the ignored border is not counted"
    plots.legend(axes, MARGIN + pitch, top + 2 * SIZE + 76, [entry])
    return figure


_WRONG = 254


# --- Two ways of upsampling --------------------------------------------------------------------

_STRIDE = 8
_VALUES = (0.2, 0.9, 0.4, 0.7)


def transposed(values: Float[np.ndarray, "h w"], noise: float) -> Float[np.ndarray, "_ _"]:
    """Upsamples by the project's transposed convolution of stride 8, with noise on its kernel."""
    decoder = TransposedDecoder(1, _STRIDE)
    kernel = np.asarray(decoder.kernel[...])
    cell = TransposedDecoder.LARGEST // _STRIDE
    # One draw for each cell of the kernel, which is averaged to a tap at this stride.
    draws = np.random.default_rng(0).standard_normal((2 * _STRIDE, 2 * _STRIDE, 1))
    decoder.kernel[...] = jnp.asarray(kernel + noise * draws.repeat(cell, 0).repeat(cell, 1))
    height, width = (side * _STRIDE for side in values.shape)
    images = jnp.zeros((1, height, width, 3))  # the decoder reads only their size
    return np.asarray(decoder(jnp.asarray(values)[None, :, :, None], images))[0, :, :, 0]


def upsampling() -> Figure:
    """Nearest, bilinear and transposed upsampling by 8."""
    figure, sheet = plots.diagram(plots.WIDTH, 390)
    values = np.asarray(_VALUES, np.float32)
    size = _STRIDE * len(values)
    pixels = np.arange(size) + 0.5
    plots.text(sheet, MARGIN, 24, "four values of stride 8, upsampled to 32 pixels", size=12)
    axes = plots.chart_axes(sheet, MARGIN + 50, 52, 410, 236)
    plots.clean_axes(axes)
    axes.stairs(
        values, np.arange(0, size + 1, _STRIDE), baseline=None, color=SKY, lw=1.6, label="nearest"
    )
    bilinear = bilinear_matrix(size, len(values)) @ values
    axes.plot(pixels, bilinear, color=BLUE, linewidth=2.2, label="bilinear")
    learned = transposed(np.tile(values, (4, 1)), 0)[size // 2]
    axes.plot(pixels, learned, "s", color=ORANGE, markersize=4, label="transposed, at its start")
    middles = _STRIDE * (np.arange(len(values)) + 0.5)
    style = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.6}
    axes.plot(middles, values, "s", color=INK, label="the four values", **style)
    axes.set(xlim=(0, size), ylim=(0, 1), xticks=range(0, size + 1, _STRIDE))
    axes.set_xlabel("pixels of the output")
    axes.set_ylabel("value")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.18), ncols=2, frameon=False)
    left, cell = 524, 5
    plots.text(sheet, left, 24, "a map of 4x4 equal values, upsampled", size=12)
    for column, (noise, words) in enumerate(
        [
            (0.0, "bilinear, or transposed\nat its start: even"),
            (0.1, "transposed, each weight\nmoved at random:\na pattern of period 8"),
        ]
    ):
        map_pixels = viridis(transposed(np.full((4, 4), 0.5, np.float32), noise))
        x = left + column * (32 * cell + 32)
        plots.picture(sheet, map_pixels, x, 52, cell)
        plots.text(sheet, x, 52 + 32 * cell + 14, words, color=GREY, va="top")
    return figure
