"""A generated data set: textured shapes on a textured ground, which differ only in outline."""

from __future__ import annotations

import math

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from deeplab_jax.config import DataConfig, ShapesConfig
from deeplab_jax.data import randomness
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.labels import IGNORE, LabelSet

LABELS = LabelSet(
    names=("background", "disc", "triangle", "ring", "cross"),
    colors=((0, 0, 0), (230, 60, 60), (255, 225, 25), (0, 130, 200), (145, 30, 180)),
)

_SPREAD = (0.12, 0.88)  # range of centres (fraction of the side) and of colours
# Shapes are lighter than the ground, so that even a short training finds them.
_GROUND_COLORS = (0, 110)
_SHAPE_COLORS = (110, 255)
_NOISE = 10  # largest, of 255
_SUBPIXEL_BITS = 6  # fractional bits of OpenCV's vertices


def _regular(corners: int, *radii: float) -> np.ndarray:
    """Returns a polygon with corners at equal angles; the radii are repeated."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


_ARM = 0.34  # half the width of the cross's arms
_TIP = np.sqrt(1 - _ARM**2)
_CORNERS = np.array([(_TIP, -_ARM), (_TIP, _ARM), (_ARM, _ARM)])  # of one arm
_TURNS = [np.linalg.matrix_power(np.array([(0, 1), (-1, 0)]), turns) for turns in range(4)]
_CROSS = np.concatenate([_CORNERS @ turn for turn in _TURNS])

# Outlines of each class, from id 1, in the unit disc. A second outline is a hole.
_DISC = _regular(48, 1.0)
_OUTLINES = ((_DISC,), (_regular(3, 1.0),), (_DISC, _regular(48, 0.5)), (_CROSS,))

_SPLITS = {"train": randomness.SHAPES_TRAIN, "val": randomness.SHAPES_VAL}


def load(config: DataConfig, split: str) -> Dataset:
    """Loads the split train or val. An image is a function of (`shapes.seed`, split, index)."""
    shapes = config.shapes
    num_images = shapes.num_train if split == "train" else shapes.num_eval
    return Dataset(ShapesSource(split, num_images, shapes), LABELS)


class ShapesSource:
    """Draws an example when it is indexed."""

    def __init__(self, split: str, num_images: int, config: ShapesConfig) -> None:
        self._split, self._num_images, self._config = split, num_images, config

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._num_images:
            raise IndexError(f"index must be in [0, {self._num_images}), got {index}")
        rng = randomness.generator(self._config.seed, _SPLITS[self._split], index)
        image, label = draw(rng, self._config)
        return {"image": image, "label": label, "name": f"shapes-{self._split}-{index:06d}"}


def draw(
    rng: np.random.Generator, config: ShapesConfig
) -> tuple[UInt8[np.ndarray, "size size 3"], UInt8[np.ndarray, "size size"]]:
    """Draws an image of 1 to `max_shapes` shapes, later ones over earlier ones, and its label.

    The class, colour and texture of a shape are independent. A pixel belongs to the class that
    covers at least half of it. A border around each shape is `labels.IGNORE`, as in VOC.
    """
    size, (smallest, largest) = config.size, config.radius_range
    num_shapes = int(rng.integers(1, config.max_shapes + 1))
    ground, *colors = _sample_far_apart(rng, num_shapes + 1, 3)
    centers = _sample_far_apart(rng, num_shapes, 2) * size
    # Channels first, so that NumPy's inner loops run along rows.
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
    """Returns how much of each pixel a randomly rotated shape covers, 0..255."""
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
    """Draws stripes, checks or blobs of random scale, direction and contrast around a colour."""
    kind = rng.integers(3)
    if kind == 2:
        cells = int(rng.integers(4, 12))
        blobs = rng.standard_normal((cells, cells), np.float32)
        pattern = cv2.resize(blobs, (size, size), interpolation=cv2.INTER_CUBIC)
    else:
        angle, phase = rng.uniform(0, 2 * np.pi, 2).tolist()
        waves = rng.uniform(5, 18)  # periods per side of the image
        along = np.linspace(0, 2 * np.pi * waves, size, dtype=np.float32)
        x, y = along * math.cos(angle), along * math.sin(angle) + phase
        pattern = np.sin(x + y[:, None])
        if kind == 1:
            x, y = along * math.sin(angle), along * math.cos(angle) + phase
            pattern *= np.sin(x - y[:, None])
    contrast = rng.uniform(-35, 35, 3).astype(np.float32)
    return color.astype(np.float32)[:, None, None] + contrast[:, None, None] * pattern


def _sample_far_apart(rng: np.random.Generator, num_points: int, dimensions: int) -> np.ndarray:
    """Samples points in the cube `_SPREAD`, `[num_points, dimensions]`, mostly far apart.

    Each point is the one of several candidates that is farthest from the points before it (Mitchell
    1991). So shapes seldom hide each other completely, and none has the colour of the ground.
    """
    points = rng.uniform(*_SPREAD, (1, dimensions))
    for _ in range(num_points - 1):
        candidates = rng.uniform(*_SPREAD, (6, dimensions))
        distances = np.linalg.norm(candidates[:, None] - points, axis=-1).min(axis=1)
        points = np.concatenate([points, candidates[[distances.argmax()]]])
    return points
