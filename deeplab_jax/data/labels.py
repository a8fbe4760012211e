"""Names and colours of classes, and the tables of VOC, CamVid and Cityscapes."""

from __future__ import annotations

import dataclasses
import re

import cv2
import numpy as np
from jaxtyping import Int, Integer

from deeplab_jax.utils.errors import UserError, did_you_mean

# The id, in labels, of pixels that count neither in the loss nor in a metric. Data sets map their
# own ignore id to it. It is the id of VOC's "void" border.
IGNORE = 255


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """Names and colours of the classes `0..num_classes-1`."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]  # (red, green, blue) of 0..255

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise ValueError(f"{len(self.names)} class names but {len(self.colors)} colours")
        if not 1 <= len(self.names) <= IGNORE:
            raise ValueError(f"a label set has 1 to {IGNORE} classes, got {len(self.names)}")

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def palette(self) -> np.ndarray:
        """Returns the colour of each id, uint8 `[256, 3]`; ids without a class are white."""
        table = np.full((256, 3), 255, np.uint8)
        table[: len(self.colors)] = self.colors
        return table


def is_background(name: str) -> bool:
    """Whether a class's name means background, as `_background_`, `BG` and `back-ground` do."""
    return re.sub(r"[\W_]", "", name.casefold()) in ("background", "bg")


def class_id(text: str, labels: LabelSet, origin: str = "") -> int:
    """Returns the id of a class that is given by its name, in any case, or by its id.

    Raises:
      UserError: there is no such class; the message begins with `origin`, and suggests the nearest
        name.
    """
    lower, wanted = [name.lower() for name in labels.names], text.strip().lower()
    if wanted in lower:
        return lower.index(wanted)
    if wanted.isdecimal() and int(wanted) < labels.num_classes:
        return int(text)
    raise UserError(
        f"{origin}there is no class {text!r}{did_you_mean(text, labels.names)}. Give a name "
        f"({', '.join(labels.names)}) or an id (0 to {labels.num_classes - 1})."
    )


def class_counts(
    ids: Integer[np.ndarray, "h w"], num_classes: int
) -> Int[np.ndarray, " num_classes"]:
    """Counts the pixels of each class."""
    if ids.dtype == np.uint8 and ids.size < 2**24:  # faster, and exact up to here: float32
        counts = cv2.calcHist([ids], [0], None, [256], [0, 256])
        return counts[:num_classes].ravel().astype(np.int64)
    return np.bincount(np.ravel(ids), minlength=num_classes)[:num_classes]


def default_positive(labels: LabelSet) -> int | None:
    """Returns, of two classes, the id of the one that is not background; None for other numbers."""
    if labels.num_classes != 2:
        return None
    first, second = map(is_background, labels.names)
    return 0 if second and not first else 1


def check_ignore_label(title: str, ignore_label: int) -> None:
    """Raises UserError unless a config's ignore label is `IGNORE`, as the data set's is."""
    if ignore_label != IGNORE:
        raise UserError(
            f"{title}'s ignored pixels have the id {IGNORE}: "
            f"config.data.ignore_label must be {IGNORE}, got {ignore_label}"
        )


def voc_palette(num_colors: int) -> tuple[tuple[int, int, int], ...]:
    """Returns the first colours of VOC's colour map.

    Bit 3 b + c of an id is bit 7 - b of colour channel c. Source: `VOClabelcolormap.m` of the VOC
    2012 development kit.
    """
    shifts = 3 * np.arange(8) + np.arange(3)[:, None]
    bits = (np.arange(num_colors)[:, None, None] >> shifts) & 1
    return tuple(map(tuple, np.packbits(bits, axis=2)[:, :, 0].tolist()))


def named(*names: str) -> LabelSet:
    """Returns a label set with the colours of VOC's colour map."""
    return LabelSet(tuple(names), voc_palette(len(names)))


def _colored(*classes: tuple[str, tuple[int, int, int]]) -> LabelSet:
    names, colors = zip(*classes, strict=True)
    return LabelSet(names, colors)


VOC = named(
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)

CAMVID = _colored(
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (0, 0, 192)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)

CITYSCAPES = _colored(
    ("road", (128, 64, 128)),
    ("sidewalk", (244, 35, 232)),
    ("building", (70, 70, 70)),
    ("wall", (102, 102, 156)),
    ("fence", (190, 153, 153)),
    ("pole", (153, 153, 153)),
    ("traffic light", (250, 170, 30)),
    ("traffic sign", (220, 220, 0)),
    ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)),
    ("sky", (70, 130, 180)),
    ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)),
    ("car", (0, 0, 142)),
    ("truck", (0, 0, 70)),
    ("bus", (0, 60, 100)),
    ("train", (0, 80, 100)),
    ("motorcycle", (0, 0, 230)),
    ("bicycle", (119, 11, 32)),
)

KNOWN = (CAMVID, CITYSCAPES, VOC)
