"""A generated data set: textured shapes on textured ground, told apart by their outline alone."""

from __future__ import annotations

import math

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from deeplab_jax.config import DataConfig, ShapesConfig
from deeplab_jax.data import randomness
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.labels import IGNORE, LabelSet
from deeplab_jax.utils.errors import UserError

LABELS = LabelSet(
    names=("background", "disc", "triangle", "ring", "cross"),
    colors=((0, 0, 0), (230, 60, 60), (255, 225, 25), (0, 130, 200), (145, 30, 180)),
)

_SPREAD = (0.12, 0.88)  # of centres over the sides, and of colours over their range
# Shapes are lighter than the ground, so that a short training need not first learn to see them.
_GROUND_COLORS = (0, 110)
_SHAPE_COLORS = (110, 255)
_NOISE = 10  # at most, of 255
_SUBPIXEL_BITS = 6  # of the vertices that OpenCV draws


def _regular(corners: int, *radii: float) -> np.ndarray:
    """A polygon with corners at equal angles, whose radii repeat."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


_ARM = 0.34  # half the width of the cross's arms
_TIP = np.sqrt(1 - _ARM**2)
_QUARTER_TURN = np.array([(0, 1), (-1, 0)])
_CROSS = np.concatenate(
    [
        np.array([(_TIP, -_ARM), (_TIP, _ARM), (_ARM, _ARM)])
        @ np.linalg.matrix_power(_QUARTER_TURN, turns)
        for turns in range(4)
    ]
)

# Outlines of each class from id 1 on, on the unit disc; the inside of a second one is a hole.
_OUTLINES: tuple[tuple[np.ndarray, ...], ...] = (
    (_regular(48, 1.0),),
    (_regular(3, 1.0),),
    (_regular(48, 1.0), _regular(48, 0.5)),
    (_CROSS,),
)

_SPLITS = {"train": randomness.SHAPES_TRAIN, "val": randomness.SHAPES_VAL}


def load(config: DataConfig, split: str) -> Dataset:
    """The split "train" or "val"; each image is a function of (`shapes.seed`, split, index).

    Raises:
      UserError: the split is another.
    """
    if split not in _SPLITS:
        raise UserError(f"data set shapes has the splits train and val, got {split!r}")
    shapes = config.shapes
    length = shapes.num_train if split == "train" else shapes.num_eval
    return Dataset(Shapes(split, length, shapes), LABELS)


class Shapes:
    """Examples drawn when they are asked for."""

    def __init__(self, split: str, length: int, config: ShapesConfig) -> None:
        """`length` is the number of images."""
        self._split, self._length, self._config = split, length, config

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(f"index must be in [0, {self._length}), got {index}")
        rng = randomness.generator(self._config.seed, _SPLITS[self._split], index)
        image, label = draw(rng, self._config)
        return {"image": image, "label": label, "name": f"shapes-{self._split}-{index:06d}"}


def draw(
    rng: np.random.Generator, config: ShapesConfig
) -> tuple[UInt8[np.ndarray, "size size 3"], UInt8[np.ndarray, "size size"]]:
    """An image of 1 to `max_shapes` shapes, later ones over earlier ones, and its label.

    Class, colour and texture of a shape are drawn independently. A pixel belongs to the class
    that covers at least half of it; a border around each shape is `labels.IGNORE`, as in VOC.
    """
    size, (smallest, largest) = config.size, config.radius_range
    num_shapes = int(rng.integers(1, config.max_shapes + 1))
    ground, *colors = _far_apart(rng, num_shapes + 1, 3)
    centers = _far_apart(rng, num_shapes, 2) * size
    # Channels first: NumPy's loops then run along rows.
    image = _texture(rng, size, np.interp(ground, (0, 1), _GROUND_COLORS))
    label = np.zeros((size, size), np.uint8)
    for center, color in zip(centers, colors, strict=True):
        class_id = int(rng.integers(1, LABELS.num_classes))
        radius = size * rng.uniform(smallest, largest)
        coverage = _coverage(rng, size, class_id, center, radius)
        texture = _texture(rng, size, np.interp(color, (0, 1), _SHAPE_COLORS))
        image += (coverage / np.float32(255)) * (texture - image)
        inside = (coverage > 127).astype(np.uint8)
        label[inside == 1] = class_id
        label[cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) == 1] = IGNORE
    image += rng.integers(-_NOISE, _NOISE, image.shape, np.int8, endpoint=True)
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), label


def _coverage(
    rng: np.random.Generator, size: int, class_id: int, center: np.ndarray, radius: float
) -> UInt8[np.ndarray, "size size"]:
    """How much of each pixel a shape of random rotation covers, 0..255."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    outlines = [
        np.rint((center + radius * outline @ rotation - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
        for outline in _OUTLINES[class_id - 1]
    ]
    coverage = np.zeros((size, size), np.uint8)
    cv2.fillPoly(coverage, outlines, 255, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
    return coverage


def _texture(
    rng: np.random.Generator, size: int, color: np.ndarray
) -> Float32[np.ndarray, "3 size size"]:
    """Stripes, checks or blobs of random scale, direction and strength around a colour."""
    kind = rng.integers(3)
    if kind == 2:
        cells = int(rng.integers(4, 12))
        blobs = rng.standard_normal((cells, cells), np.float32)
        pattern = cv2.resize(blobs, (size, size), interpolation=cv2.INTER_CUBIC)
    else:
        angle, phase = rng.uniform(0, 2 * np.pi, 2).tolist()
        waves = rng.uniform(5, 18)  # over the side of the image
        along = np.linspace(0, 2 * np.pi * waves, size, dtype=np.float32)
        x, y = along * math.cos(angle), along * math.sin(angle) + phase
        pattern = np.sin(x + y[:, None])
        if kind == 1:
            x, y = along * math.sin(angle), along * math.cos(angle) + phase
            pattern *= np.sin(x - y[:, None])
    contrast = rng.uniform(-35, 35, 3).astype(np.float32)
    return color.astype(np.float32)[:, None, None] + contrast[:, None, None] * pattern


def _far_apart(rng: np.random.Generator, count: int, dimensions: int) -> np.ndarray:
    """Points of a cube with side `_SPREAD`, `[count, dimensions]`, mostly far from each other.

    Each is the farthest of several candidates from those before it (Mitchell 1991): shapes
    seldom hide each other wholly, and none has the colour of its ground.
    """
    points = rng.uniform(*_SPREAD, (1, dimensions))
    for _ in range(count - 1):
        candidates = rng.uniform(*_SPREAD, (6, dimensions))
        distances = np.linalg.norm(candidates[:, None] - points, axis=-1).min(axis=1)
        points = np.concatenate([points, candidates[[distances.argmax()]]])
    return points
