"""Class tables: the name and colour of each class id of the data sets known here."""

from __future__ import annotations

import dataclasses

import numpy as np

# Label id of pixels that count neither in the loss nor in a metric, after a data set's own
# ignore id has been mapped to it. It is VOC's "void" border.
IGNORE = 255


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """Names and colours of the classes `0..num_classes-1`.

    Attributes:
      names: one name a class, in the order of ids.
      colors: one `(red, green, blue)` triple a class, each 0..255.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise ValueError(f"{len(self.names)} class names but {len(self.colors)} colours")
        if not 1 <= len(self.names) <= IGNORE:
            raise ValueError(f"a label set has 1 to {IGNORE} classes, got {len(self.names)}")

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def palette(self) -> np.ndarray:
        """uint8 `[256, 3]`: the colour of each id; ids without a class are white."""
        table = np.full((256, 3), 255, np.uint8)
        table[: len(self.colors)] = self.colors
        return table


def voc_palette(num_colors: int) -> tuple[tuple[int, int, int], ...]:
    """VOC's colour map: bits of the id are spread over red, green and blue from the top bit down.

    Source: `VOClabelcolormap.m` of the VOC 2012 development kit.
    """
    colors = []
    for index in range(num_colors):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colors.append((channels[0], channels[1], channels[2]))
    return tuple(colors)


def named(*names: str) -> LabelSet:
    """A label set with VOC's colour map."""
    return LabelSet(tuple(names), voc_palette(len(names)))


VOC = named(
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

CAMVID = LabelSet(
    *zip(
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
        strict=True,
    )
)

CITYSCAPES = LabelSet(
    *zip(
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
        strict=True,
    )
)
