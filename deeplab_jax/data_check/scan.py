"""Reads a pair of an image and a mask, and collects what the check counts and reports."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int16, Int64, UInt8
from PIL import UnidentifiedImageError

from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.io import images, masks, polygons
from deeplab_jax.data.io.masks import UNKNOWN, UNSURE, MaskFormat
from deeplab_jax.data.io.polygons import ShapeError
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.data_check import duplicates
from deeplab_jax.utils.errors import UserError

_MAX_VALUES = 300  # of the different values in a mask that are kept


@dataclasses.dataclass
class Scan:
    """The contents of a pair; fields keep their defaults if a file cannot be read."""

    split: str
    pair: Pair
    # (kind, example) of each problem; the kinds are in `data_check.findings`.
    remarks: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    size: tuple[int, int] | None = None  # height and width of the image, pixels
    counts: Int64[np.ndarray, " classes"] | None = None  # pixels of each class
    ignored: int = 0  # pixels
    unknown: dict[int, int] = dataclasses.field(default_factory=dict)  # pixels by value of no class
    values: frozenset[int] = frozenset()  # up to 300 of those of `MaskFormat.read_values`
    digest: bytes | None = None  # of the image, see `data_check.duplicates`
    gradients: Int16[np.ndarray, " 64"] | None = None

    @property
    def readable(self) -> bool:
        """Whether both files could be read."""
        return self.size is not None and self.counts is not None


def scan_pair(split: str, pair: Pair, mask_format: MaskFormat, num_channels: int) -> Scan:
    """Reads both files of a pair; their errors become remarks."""
    result = Scan(split, pair)
    _scan_image(result, num_channels)
    try:
        _scan_mask(result, mask_format)
    except UserError as error:
        kinds = {ShapeError: "shapes", masks.ColorsError: "colors"}
        result.remarks.append((kinds.get(type(error), "unreadable"), str(error)))
    return result


def _scan_image(result: Scan, num_channels: int) -> None:
    path = result.pair.image
    try:
        image = images.read_image(path, num_channels)
    except UserError as error:
        result.remarks.append(("unreadable", str(error)))
        return
    result.size = image.shape[:2]
    result.digest = duplicates.digest(image)
    result.gradients = duplicates.thumbnail_gradients(image)
    if (orientation := images.orientation(path)) != 1:
        result.remarks.append(("exif", f"{path}: orientation {orientation}"))
    if path.suffix.lower() == ".npy":
        return
    is_deep, is_transparent = _describe(path)
    if is_deep:
        text = f"{path}: the largest value read is {image.max()} of 255"
        result.remarks.append(("16 bits", text))
    if is_transparent and num_channels in (1, 3):
        result.remarks.append(("transparent", str(path)))


def _describe(path: pathlib.Path) -> tuple[bool, bool]:
    """Whether a readable image has more than 8 bits per channel, and transparent pixels."""
    try:
        with images.open_image(path) as image:
            is_deep = images.is_deep(image)
            if not image.has_transparency_data or image.mode[0] in "IF":
                return is_deep, False
            return is_deep, bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)
    except UnidentifiedImageError:  # OpenCV has read it, for example floating-point colours
        return True, False


def _scan_mask(result: Scan, mask_format: MaskFormat) -> None:
    path = result.pair.mask
    is_drawn = polygons.is_json(path)
    values = mask_format.draw(path, result.remarks) if is_drawn else mask_format.read_values(path)
    ids = mask_format.to_ids(values)
    if not is_drawn and images.is_lossy(path) and not mask_format.is_complete:
        result.remarks.append(("jpeg mask", str(path)))
    if result.size is not None and ids.shape != result.size:
        try:
            masks.check_size(result.pair.image, result.size, path, ids.shape)
        except UserError as error:
            result.remarks.append(("sizes differ", str(error)))
    classes = mask_format.labels.num_classes
    counts = np.bincount(ids[ids >= 0], minlength=IGNORE + 1)
    result.counts, result.ignored = counts[:classes].astype(np.int64), int(counts[IGNORE])
    result.values = frozenset(np.unique(values)[:_MAX_VALUES].tolist())
    unknown = ids == UNKNOWN
    if unknown.any():
        found, times = np.unique(values[unknown], return_counts=True)
        result.unknown = dict(zip(found.tolist(), times.tolist(), strict=True))
        result.remarks.append(("unknown", mask_format.describe_unknown(path, values, unknown)))
    elif mask_format.is_doubtful(values):
        result.remarks.append(("mixed", f"{path}: {UNSURE}"))
    elif result.ignored == ids.size:
        result.remarks.append(("all ignored", str(path)))


@dataclasses.dataclass(frozen=True)
class ClassCount:
    """Frequency of a class, by split."""

    id: int
    name: str
    color: tuple[int, int, int]
    pixels: dict[str, int]
    share: dict[str, float]  # fraction of the pixels of all classes
    images: dict[str, int]  # number of images with a pixel of it


def count_classes(scans: Sequence[Scan], mask_format: MaskFormat) -> tuple[ClassCount, ...]:
    """Counts the pixels and images of each class, by split."""
    labels = mask_format.labels
    pixels: dict[str, np.ndarray] = {}  # of each class, by split
    images: dict[str, np.ndarray] = {}
    for split in dict.fromkeys(one.split for one in scans):
        rows = [one.counts for one in scans if one.split == split and one.counts is not None]
        counts = np.array(rows, np.int64).reshape(-1, labels.num_classes)
        pixels[split], images[split] = counts.sum(axis=0), (counts > 0).sum(axis=0)
    return tuple(
        ClassCount(
            index,
            *(labels.names[index], labels.colors[index]),
            pixels={split: int(n[index]) for split, n in pixels.items()},
            share={split: float(n[index] / max(n.sum(), 1)) for split, n in pixels.items()},
            images={split: int(n[index]) for split, n in images.items()},
        )
        for index in range(labels.num_classes)
    )


def thumbnail(
    result: Scan, mask_format: MaskFormat, num_channels: int, box: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "h w"]]:
    """Reads an image and its label, resized to fit into a box of height and width in pixels.

    The pair must be readable. Unknown pixels become ignored.
    """
    assert result.size is not None, result.pair.name  # it is readable
    image = images.read_image(result.pair.image, num_channels)
    ids = mask_format.to_ids(mask_format.read_values(result.pair.mask))
    label = np.where(ids == UNKNOWN, IGNORE, ids).astype(np.uint8)
    scale = min(box[0] / result.size[0], box[1] / result.size[1])
    height, width = (max(1, round(scale * side)) for side in result.size)
    pixels = np.ascontiguousarray(image[:, :, :3])
    shrunk = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return shrunk.reshape(height, width, -1), cv2.resize(
        label, (width, height), interpolation=cv2.INTER_NEAREST
    )
