"""Section 1 and 2 of the guide: labels and mIoU, what a stride loses, two ways of upsampling."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from scipy import ndimage

from deeplab_jax.config import DataConfig, ShapesConfig
from deeplab_jax.data.dataset import Example
from deeplab_jax.data.datasets import shapes
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.evaluation.confusion import count, scores
from deeplab_jax.models.decoders import TransposedDecoder
from deeplab_jax.models.ops.resize import bilinear_matrix
from deeplab_jax.visualization.canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    Canvas,
    Color,
    text_width,
)
from drawing.sheet import (
    MARGIN,
    PAPER,
    WIDTH,
    Axes,
    Picture,
    colored,
    enlarged,
    framed,
    grid_lines,
    lines_of_text,
    viridis,
)

Ids = UInt8[np.ndarray, "h w"]

NUM_CLASSES = shapes.LABELS.num_classes
NAMES = shapes.LABELS.names
COLORS: dict[int, Color] = dict(enumerate([(40, 40, 40), YELLOW, SKY, GREEN, PURPLE]))
COLORS[IGNORE] = PAPER

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


def segmentation() -> Picture:
    """An image, its labels, and mIoU on a map of 4x4 pixels."""
    canvas = Canvas(WIDTH, 338)
    example = images()[_EXAMPLE]
    top = 48
    for column, (title, panel) in enumerate(
        [("image", example["image"]), ("label map", colored(example["label"], COLORS))]
    ):
        left = MARGIN + column * (SIZE + 24)
        canvas.text(left, 26, title, size=16)
        framed(canvas, panel, left, top)
    _legend(canvas, MARGIN, top + SIZE + 24, example["label"])
    left, side = 490, 44
    for column, (title, ids) in enumerate([("labels", TRUTH), ("predicted", PREDICTED)]):
        x = left + column * (4 * side + 36)
        canvas.text(x, 26, title, size=16)
        _digits(canvas, x, top, ids, side)
    for row, (text, result) in enumerate(_worked_example()):
        y = top + 4 * side + 26 + 22 * row
        canvas.text(left, y, text, size=15)
        canvas.text(left + 4 * side + 36, y, result, size=15)
    return canvas.picture()


def _worked_example() -> list[tuple[str, str]]:
    """A line a class: pixels in both maps over pixels in either; and the mean."""
    matrix = count(TRUTH, PREDICTED, 3)
    found = scores(matrix)
    lines = []
    for index in range(3):
        both, either = matrix[index, index], matrix[index].sum() + matrix[:, index].sum()
        share = f"{both} / {either - both} = {100 * found.per_class_iou[index]:.1f} %"
        lines.append((f"IoU of class {index}: both / either", share))
    return [*lines, ("mIoU: the mean of the three", f"{100 * found.miou:.1f} %")]


def _digits(canvas: Canvas, left: int, top: int, ids: Ids, side: int) -> None:
    """A small map with its ids written in; what is wrong is framed."""
    canvas.paste(enlarged(colored(ids, COLORS), side), left, top)
    rows, columns = ids.shape
    grid_lines(canvas, left, top, (rows, columns), side)
    for (row, column), index in np.ndenumerate(ids):
        x, y = left + side * column, top + side * row
        ink = PAPER if index == 0 else INK
        text = "-" if index == IGNORE else str(index)
        canvas.text(x + side / 2, y + side / 2, text, size=17, anchor="mm", color=ink)
        if index != TRUTH[row, column] and TRUTH[row, column] != IGNORE:
            canvas.box(x + 2, y + 2, x + side - 2, y + side - 2, outline=VERMILLION, thickness=3.5)


def _legend(canvas: Canvas, left: float, y: float, label: Ids) -> None:
    x = left
    for index in np.unique(label).tolist():
        canvas.box(x, y - 7, x + 14, y + 7, fill=COLORS[index])
        name = "ignored" if index == IGNORE else NAMES[index]
        canvas.text(x + 20, y, name, size=14)
        x += 36 + text_width(name, 14)


# --- What a stride loses -----------------------------------------------------------------------

_EXAMPLE = 15  # an image of three classes
STRIDES = (4, 8, 16, 32)
METHODS = ("nearest", "bilinear", "shares", "grid")


@functools.cache
def whole_label(index: int) -> Ids:
    """The label of an image with each ignored pixel given to the nearest class."""
    label = images()[index]["label"]
    _, (rows, columns) = ndimage.distance_transform_edt(label == IGNORE, return_indices=True)
    return label[rows, columns]


def centres(size: int, side: int) -> Int[np.ndarray, " side"]:
    """The pixels on which a resize to `size` with half-pixel centres lays a map's pixels."""
    return np.floor((np.arange(side) + 0.5) * size / side).astype(int)


def through_stride(label: Ids, stride: int, method: str) -> Ids:
    """The ids that are left of a label known at each `stride`-th pixel alone.

    Args:
      label: without ignored pixels, square.
      stride: pixels.
      method: "nearest": ids at the centres, repeated. "bilinear": scores of 0 and 1 of the ids at
        the centres, resized as logits are. "shares": scores that are each class's share of a cell.
        "grid": as "bilinear", of the ids at each `stride`-th pixel from the first on.
    """
    size = label.shape[0]
    side = -(-size // stride)
    at = np.arange(side) * stride if method == "grid" else centres(size, side)
    small = label[np.ix_(at, at)]
    if method == "nearest":
        near = centres(side, size)
        return small[np.ix_(near, near)]
    if method == "shares":
        cells = _cell_means(size, side)
        scores_of_cells = cells @ _one_hot(label) @ cells.T
    else:
        scores_of_cells = _one_hot(small)
    resize = bilinear_matrix(size, side).astype(np.float32)
    return np.argmax(resize @ scores_of_cells @ resize.T, axis=0).astype(np.uint8)


def _one_hot(ids: Ids) -> Float32[np.ndarray, "classes h w"]:
    return (ids == np.arange(NUM_CLASSES)[:, None, None]).astype(np.float32)


def _cell_means(size: int, side: int) -> Float32[np.ndarray, "side size"]:
    """The mean over each of `side` equal cells of `size` pixels, as a matrix."""
    edges = np.arange(side + 1) * size / side
    pixels = np.arange(size)
    upper = np.minimum(edges[1:, None], pixels + 1)
    lower = np.maximum(edges[:-1, None], pixels)
    return (np.clip(upper - lower, 0, None) * side / size).astype(np.float32)


@functools.cache
def best_miou(stride: int, method: str) -> float:
    """mIoU over the images, in percent, of what is left of their labels behind a stride."""
    matrix = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for index in range(NUM_IMAGES):
        ids = through_stride(whole_label(index), stride, method)
        matrix += count(images()[index]["label"], ids, NUM_CLASSES)
    return 100 * scores(matrix).miou


def strides() -> Picture:
    """Labels behind strides of 8, 16 and 32, upsampled again."""
    canvas = Canvas(WIDTH, 516)
    label, whole = images()[_EXAMPLE]["label"], whole_label(_EXAMPLE)
    pitch = SIZE + 24
    for row, (method, text) in enumerate(
        [("nearest", "ids repeated"), ("bilinear", "scores resized")]
    ):
        top = 50 + row * (SIZE + 52)
        for column, stride in enumerate(STRIDES[1:], start=1):
            left = MARGIN + column * pitch
            ids = through_stride(whole, stride, method)
            wrong = (ids != label) & (label != IGNORE)
            canvas.text(left, top - 18, f"stride {stride}, {text}", size=15)
            framed(canvas, colored(np.where(wrong, _WRONG, ids), _WITH_WRONG), left, top)
    top = 50
    canvas.text(MARGIN, top - 18, "label map", size=15)
    framed(canvas, colored(label, COLORS), MARGIN, top)
    canvas.text(MARGIN, top + SIZE + 34, "what stride 16 keeps of it", size=15)
    side = -(-SIZE // 16)
    small = whole[np.ix_(centres(SIZE, side), centres(SIZE, side))]
    factor = SIZE // side
    framed(canvas, enlarged(colored(small, COLORS), factor), MARGIN, top + SIZE + 52)
    y = top + 2 * SIZE + 52 + 16
    canvas.box(MARGIN + pitch, y - 7, MARGIN + pitch + 14, y + 7, fill=VERMILLION)
    canvas.text(MARGIN + pitch + 21, y, "wrong pixels; the ignored border is not counted", size=14)
    return canvas.picture()


_WRONG = 254
_WITH_WRONG = {**COLORS, _WRONG: VERMILLION}


# --- Two ways of upsampling --------------------------------------------------------------------

_STRIDE = 8
_VALUES = (0.2, 0.9, 0.4, 0.7)


def transposed(values: Float[np.ndarray, "h w"], noise: float) -> Float[np.ndarray, "_ _"]:
    """The project's transposed convolution of stride 8, its kernel changed by so much noise."""
    decoder = TransposedDecoder(1, _STRIDE)
    kernel = np.asarray(decoder.kernel[...])
    cell = TransposedDecoder.LARGEST // _STRIDE
    # One draw for each cell that is averaged to a tap at this stride.
    draws = np.random.default_rng(0).standard_normal((2 * _STRIDE, 2 * _STRIDE, 1))
    decoder.kernel[...] = jnp.asarray(kernel + noise * draws.repeat(cell, 0).repeat(cell, 1))
    height, width = (side * _STRIDE for side in values.shape)
    images = jnp.zeros((1, height, width, 3))  # of which the decoder reads the size
    return np.asarray(decoder(jnp.asarray(values)[None, :, :, None], images))[0, :, :, 0]


def upsampling() -> Picture:
    """Nearest, bilinear and transposed upsampling by 8."""
    canvas = Canvas(WIDTH, 372)
    values = np.asarray(_VALUES, np.float32)
    size = _STRIDE * len(values)
    pixels = np.arange(size) + 0.5
    axes = Axes(MARGIN + 36, 52, 420, 236, (0, size), (0, 1))
    canvas.text(MARGIN, 24, "four values of stride 8, upsampled to 32 pixels", size=16)
    ticks = {float(x): str(x) for x in range(0, size + 1, _STRIDE)}
    axes.draw(canvas, ticks, {y / 4: f"{y / 4:g}" for y in range(5)}, "pixels of the output")
    steps = np.repeat(values, _STRIDE)
    canvas.line(_staircase(axes, steps), SKY, 2)
    bilinear = bilinear_matrix(size, len(values)) @ values
    canvas.line(axes.points(pixels, bilinear), BLUE, 3)
    for x, y in axes.points(pixels, transposed(np.tile(values, (4, 1)), 0)[size // 2]):
        canvas.box(x - 2.2, y - 2.2, x + 2.2, y + 2.2, fill=ORANGE, outline=INK, thickness=0.4)
    for x, y in axes.points(_STRIDE * (np.arange(len(values)) + 0.5), values):
        canvas.box(x - 5, y - 5, x + 5, y + 5, outline=INK, thickness=2)
    for place, (color, text) in enumerate(
        [(SKY, "nearest"), (BLUE, "bilinear"), (ORANGE, "transposed, at its start")]
    ):
        x = axes.left + 124 * place
        canvas.line([(x, 350), (x + 24, 350)], color, 4)
        canvas.text(x + 31, 350, text, size=14)
    left, factor = 524, 5
    canvas.text(left, 24, "a map of 4x4 equal values, upsampled", size=16)
    for column, (noise, lines) in enumerate(
        [
            (0.0, ("bilinear, or transposed", "at its start: even")),
            (0.1, ("transposed, each weight", "moved at random: a", "pattern of period 8")),
        ]
    ):
        picture = viridis(transposed(np.full((4, 4), 0.5, np.float32), noise))
        x = left + column * (32 * factor + 32)
        framed(canvas, enlarged(picture, factor), x, 52)
        lines_of_text(canvas, x, 52 + 32 * factor + 20, lines, color=GREY)
    return canvas.picture()


def _staircase(axes: Axes, values: Float[np.ndarray, " n"]) -> list[tuple[float, float]]:
    """Each value held over its pixel."""
    xs = np.repeat(np.arange(len(values) + 1), 2)[1:-1]
    return axes.points(xs, np.repeat(values, 2))
