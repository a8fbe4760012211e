"""One pair of an image and a mask, read whole: what `check` counts and `findings` judges."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from deeplab_jax.data.io import reading
from deeplab_jax.data.io.masks import UNKNOWN, MaskFormat
from deeplab_jax.data.io.reading import Pair
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.data_check import duplicates
from deeplab_jax.utils.errors import UserError

_MAX_VALUES = 300  # kept of the values that a mask holds


@dataclasses.dataclass
class Scan:
    """What a pair was found to be; fields stay empty where a file cannot be read.

    Attributes:
      split: it belongs to.
      pair: its files.
      remarks: (kind, sentence) of each thing to tell; `data_check.findings` knows the kinds.
      size: height and width of the image, pixels.
      counts: pixels of each class.
      ignored: pixels that do not count.
      unknown: pixels of each value that is of no class.
      values: those that the mask holds, as `MaskFormat.read_values` gives them; not all of many.
      digest, hash: of the image, see `data_check.duplicates`.
    """

    split: str
    pair: Pair
    remarks: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    size: tuple[int, int] | None = None
    counts: Int64[np.ndarray, " classes"] | None = None
    ignored: int = 0
    unknown: dict[int, int] = dataclasses.field(default_factory=dict)
    values: frozenset[int] = frozenset()
    digest: bytes | None = None
    hash: int | None = None

    @property
    def readable(self) -> bool:
        """Whether both files were read."""
        return self.size is not None and self.counts is not None


def scan(split: str, pair: Pair, mask_format: MaskFormat, num_channels: int) -> Scan:
    """Reads both files of a pair."""
    result = Scan(split, pair)
    _scan_image(result, num_channels)
    try:
        _scan_mask(result, mask_format)
    except reading.ColorsError as error:
        result.remarks.append(("colors", str(error)))
    except UserError as error:
        result.remarks.append(("unreadable", str(error)))
    return result


def _scan_image(result: Scan, num_channels: int) -> None:
    path = result.pair.image
    try:
        if path.suffix.lower() != ".npy":
            reading.check_image(path)  # OpenCV alone would fill up some truncated files
        image = reading.read_image(path, num_channels)
    except UserError as error:
        result.remarks.append(("unreadable", str(error)))
        return
    result.size = image.shape[:2]
    result.digest = duplicates.digest(image)
    result.hash = duplicates.difference_hash(image)
    orientation = reading.orientation(path)
    if orientation != 1:
        result.remarks.append(("exif", f"{path}: orientation {orientation}"))
    if _is_deep(path):
        result.remarks.append(("16 bits", str(path)))


def _is_deep(path: pathlib.Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.mode.startswith(("I", "F"))
    except Exception:  # a format that Pillow lacks
        return False


def _scan_mask(result: Scan, mask_format: MaskFormat) -> None:
    path = result.pair.mask
    values = mask_format.read_values(path)
    ids = mask_format.to_ids(values)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        result.remarks.append(("jpeg mask", str(path)))
    if result.size is not None and ids.shape != result.size:
        try:
            reading.check_sizes(result.pair.image, result.size, path, ids.shape)
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
    elif result.ignored == ids.size:
        result.remarks.append(("all ignored", str(path)))


@dataclasses.dataclass(frozen=True)
class ClassCount:
    """How often a class occurs, by split.

    Attributes:
      id, name, color: of the class.
      pixels: that show it.
      share: of the pixels of all classes.
      images: that show it.
    """

    id: int
    name: str
    color: tuple[int, int, int]
    pixels: dict[str, int]
    share: dict[str, float]
    images: dict[str, int]


def count_classes(scans: Sequence[Scan], mask_format: MaskFormat) -> tuple[ClassCount, ...]:
    """Pixels and images of each class, by split."""
    labels = mask_format.labels
    table: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split in dict.fromkeys(one.split for one in scans):
        counts = [one.counts for one in scans if one.split == split and one.counts is not None]
        matrix = np.stack(counts) if counts else np.zeros((0, labels.num_classes), np.int64)
        table[split] = matrix.sum(axis=0), (matrix > 0).sum(axis=0)
    return tuple(
        ClassCount(
            id=index,
            name=labels.names[index],
            color=labels.colors[index],
            pixels={split: int(pixels[index]) for split, (pixels, _) in table.items()},
            share={
                split: float(pixels[index] / max(pixels.sum(), 1))
                for split, (pixels, _) in table.items()
            },
            images={split: int(images[index]) for split, (_, images) in table.items()},
        )
        for index in range(labels.num_classes)
    )


def thumbnail(
    result: Scan, mask_format: MaskFormat, num_channels: int, box: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w c"], UInt8[np.ndarray, "h w"]]:
    """The image and its label, as large as fit a box; pixels of no class as ignored.

    Args:
      result: of a pair that could be read.
      mask_format: what the mask holds.
      num_channels: of the image.
      box: height and width, pixels.
    """
    assert result.size is not None, result.pair.name  # else it cannot be read
    image = reading.read_image(result.pair.image, num_channels)
    ids = mask_format.to_ids(mask_format.read_values(result.pair.mask))
    label = np.where(ids == UNKNOWN, IGNORE, ids).astype(np.uint8)
    scale = min(box[0] / result.size[0], box[1] / result.size[1])
    height, width = (max(1, round(scale * side)) for side in result.size)
    shrunk = cv2.resize(
        np.ascontiguousarray(image[:, :, :3]), (width, height), interpolation=cv2.INTER_AREA
    )
    shrunk = shrunk.reshape(height, width, -1)
    return shrunk, cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)
