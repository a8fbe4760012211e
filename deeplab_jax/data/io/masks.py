"""Mask files: class ids, class colours, or 0 and 255, decoded to class ids."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable

import cv2
import numpy as np
from jaxtyping import Int16, Integer, UInt8

from deeplab_jax.data.dataset import Pair, check_ids
from deeplab_jax.data.io import arrays, coco_json, images, labelme_json, polygons
from deeplab_jax.data.io.class_formats import (
    MAX_CLASSES,
    assign_names,
    from_rgb,
    to_rgb,
    two_readings,
)
from deeplab_jax.data.labels import IGNORE, LabelSet, named, voc_palette
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_png

BINARY = named("background", "foreground")

# Why a mask of 0 and 255 is refused, and what makes it run.
UNSURE = (
    "holds only 0 and 255, where other masks hold class ids: 255 may be a class here, or not "
    "count. If it does not count, write the line `ignore 255` into classes.txt; if it is a class, "
    "add 255 to that class's line, as in `crack 1 255`."
)
UNKNOWN = -1  # the id of a pixel that is neither of a class nor ignored
# The border in VOC's masks converted to RGB: entry 255 of its colour map.
VOC_BORDER = voc_palette(256)[255]
# Lossy formats change red, green and blue of a grey pixel by less than this.
_GREY_SPREAD = 48


class ColorsError(UserError):
    """A mask holds colours where class ids are expected."""


@dataclasses.dataclass(frozen=True)
class MaskFormat:
    """How masks encode classes. Pickles, and hashes.

    Attributes:
      encoding: how values are read. "ids": whole numbers as stored, of a palette its indices;
        "colors": red * 65536 + green * 256 + blue; "binary": grey values.
      labels: names and colours of the classes.
      ignore_label: the setting; the value of pixels that do not count, unless `values` say more.
      values: the ids of values, see `ClassTable.values`; later ones count. Empty: the values of
        "ids" are the ids, those of "colors" the classes' colours, those of "binary" 0 and 255.
      is_unsure: whether no mask that was seen proves that 255 does not count. A mask that holds
        only class 0 and 255 is then refused: 255 may be its second class.
      notes: what was found out, not set, in words for the user.
    """

    encoding: str
    labels: LabelSet
    ignore_label: int
    values: tuple[tuple[int, int, int], ...] = ()
    is_unsure: bool = False
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def meanings(self) -> tuple[tuple[int, int, int], ...]:
        """First and last of values, and their id, of all values that have one."""
        if self.values:
            return self.values
        classes = range(self.labels.num_classes)
        ignored = (self.ignore_label, self.ignore_label, IGNORE)
        if self.encoding == "ids":
            return (*((i, i, i) for i in classes), ignored)
        if self.encoding == "binary":
            return (ignored, (0, 0, 0), (255, 255, 1))
        colors = map(from_rgb, self.labels.colors)
        border = (from_rgb(VOC_BORDER),) * (self.ignore_label == IGNORE)
        return (*((c, c, IGNORE) for c in border), *((c, c, i) for i, c in enumerate(colors)))

    @property
    def is_complete(self) -> bool:
        """Whether every grey value has a meaning, so that lossy formats do no harm."""
        return self.encoding != "colors" and bool((_id_table(self)[:256] != UNKNOWN).all())

    def read_values(self, path: pathlib.Path) -> Integer[np.ndarray, "h w"]:
        """Reads a mask's pixels: ids, grey values, or colours as red * 65536 + green * 256 + blue.

        Raises:
          UserError: the file cannot be read, or holds colours where ids are expected.
        """
        if polygons.is_json(path):
            return self.draw(path, [])
        if self.encoding == "ids" or path.suffix.lower() in arrays.SUFFIXES:
            try:
                return read_ids(path)
            except ColorsError as error:
                if (grey := read_lossy_grey(path)) is not None:
                    return grey
                raise ColorsError(
                    f"{error} Or, if each class has a colour, set "
                    "config.data.folder.masks_hold=colors and write the colours into classes.txt."
                ) from None
        mask = images.decode_8_bits(images.read_bytes(path), path, keep_grey=True)
        if mask.mode[0] in "IF":
            values = _to_whole(path, np.asarray(mask))
            return values if self.encoding == "binary" else values.clip(0, 255) * 0x010101
        if mask.mode in ("LA", "RGBA"):
            _require_constant(path, np.asarray(mask)[..., -1])
        if self.encoding == "binary" and mask.mode in ("1", "L", "LA"):
            return np.asarray(mask.convert("L"))
        rgb = np.asarray(mask.convert("RGB")).astype(np.int32)
        if self.encoding == "colors":
            return rgb[:, :, 0] << 16 | rgb[:, :, 1] << 8 | rgb[:, :, 2]
        if (rgb != rgb[:, :, :1]).any() and not images.is_lossy(path):
            raise UserError(
                f"{path}: holds colours, not 0 and 255. Save it as a grey PNG, or set "
                "config.data.folder.masks_hold=ids if it has a palette, else to colors."
            )
        return np.asarray(mask.convert("L"))

    def draw(self, path: pathlib.Path, remarks: list[tuple[str, str]]) -> UInt8[np.ndarray, "h w"]:
        """Draws the shapes of a mask that is JSON. What the user should know is added to remarks.

        Raises:
          UserError: the file cannot be read.
          ShapeError: a shape cannot be drawn.
        """
        classes = self.labels.names, self.ignore_label
        if polygons.is_coco(path):
            return coco_json.draw(path.parent, path.name, *classes, remarks)
        return labelme_json.draw(path, *classes, remarks)

    def to_ids(self, values: Integer[np.ndarray, "h w"]) -> Int16[np.ndarray, "h w"]:
        """Converts values to class ids, `labels.IGNORE` and `UNKNOWN`."""
        table = _id_table(self)
        if values.dtype == np.uint8:
            return cv2.LUT(values, table[:256])
        return table[np.where((values < 0) | (values >= len(table) - 1), len(table) - 1, values)]

    def read_label(self, path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
        """Reads a mask as class ids, with `labels.IGNORE` for pixels that do not count.

        Raises:
          UserError: the file cannot be read, or a pixel is of no class.
        """
        values = self.read_values(path)
        ids = self.to_ids(values)
        unknown = ids == UNKNOWN
        if unknown.any():
            if images.is_lossy(path):
                fix = "JPEG changes values, as all lossy formats do: save masks as PNG."
                if self.labels.num_classes == 2:
                    fix += " Or set config.data.folder.threshold=128."
            else:
                found = set(np.unique(values).tolist())
                fix = self.suggest_fix(found, set(np.unique(values[unknown]).tolist()))
            raise UserError(f"{self.describe_unknown(path, values, unknown)} {fix}")
        if self.is_doubtful(values):
            raise UserError(f"{path}: {UNSURE}")
        return ids.astype(np.uint8)

    def describe_unknown(self, path: pathlib.Path, values: np.ndarray, unknown: np.ndarray) -> str:
        """Describes the pixels of a mask that are of no class: their values, place and number.

        Args:
          path: the mask.
          values: its pixels, `[h, w]`.
          unknown: whether each pixel is of no class, `[h, w]`; at least one is.
        """
        y, x = np.argwhere(unknown)[0]
        value = int(values[y, x])
        num_others = len(np.unique(values[unknown])) - 1
        others = f" and {num_others} others" if num_others else ""
        if self.encoding == "colors":
            distances = np.square(np.subtract(self.labels.colors, to_rgb(value))).sum(axis=1)
            nearest = int(distances.argmin())
            expected = (
                "the colour of a class nor ignored; nearest is "
                f"{self.labels.names[nearest]} {self.labels.colors[nearest]}"
            )
        else:
            known = np.flatnonzero(_id_table(self)[:-1] != UNKNOWN)
            expected = f"a class nor ignored ({spell_values(known.tolist())})"
        return (
            f"{path}: {self.describe_value(value)}{others}, first at pixel x {x}, y {y}, is "
            f"neither {expected} ({int(unknown.sum())} pixels)."
        )

    def describe_value(self, value: int) -> str:
        """Describes a value: "id 3", "value 128" or "colour (1, 2, 3)"."""
        if self.encoding == "colors":
            return f"colour {to_rgb(value)}"
        return f"{'id' if self.encoding == 'ids' else 'value'} {value}"

    def is_doubtful(self, values: Integer[np.ndarray, "h w"]) -> bool:
        """Whether a mask of these values is refused, because 255 may be a class; see `UNSURE`."""
        has_255 = self.is_unsure and bool((values == 255).any())
        return has_255 and np.unique(values).tolist() == [0, 255]

    def suggest_fix(self, values: set[int], unknown: set[int]) -> str:
        """Suggests a fix for masks with pixels of no class.

        Args:
          values: all values in the masks.
          unknown: those of no class.
        """
        are_colors, are_ids = self.encoding == "colors", self.encoding == "ids"
        greys = {v & 255 for v in values if v == (v & 255) * 0x010101} if are_colors else values
        if len(greys) == len(values):
            if self.encoding != "binary" and greys <= {0, 255}:
                return "For masks of 0 and 255, set config.data.folder.masks_hold=binary."
            is_set = are_colors or not self.notes  # not found by the values of other masks
            if is_set and not are_ids and max(greys - {255}, default=0) < MAX_CLASSES:
                return "If the masks hold class ids, set config.data.folder.masks_hold=ids."
        if are_colors:
            return (
                "Fix the mask, or add the colour to the file of classes; if it does not count, "
                "set config.data.ignore_label to the number of its line, from 0."
            )
        if are_ids and unknown <= {
            red for red, *others in self.labels.colors if {red} == {*others}
        }:
            return "If the masks hold colours, set config.data.folder.masks_hold=colors."
        if min(unknown) < 0 or max(unknown) > 65535:
            return "Values must be 0 to 65535: change the others."
        if are_ids and not self.values:
            names, counted = self.labels.names, values - {self.ignore_label}
            if readings := two_readings(names, counted):
                return f"In the masks {readings}"
            if lines := assign_names(names, counted):
                return f"If that is their order, write into classes.txt:\n{lines}"
            if max(unknown) <= 255:
                ignored = f"={min(unknown)} if it does not count" * (len(unknown) == 1)
                return f"Fix the mask, name the class, or set config.data.ignore_label{ignored}."
        return (
            "Fix the mask, or give the value to a class in classes.txt, as in `crack 3 4 255`, "
            f"or, if it does not count, to `ignore {min(unknown)}`."
        )


# 32 MB for colours: made at first use in each process, and not pickled.
@functools.lru_cache(maxsize=4)
def _id_table(mask_format: MaskFormat) -> Int16[np.ndarray, " values"]:
    """The id of each value; the last entry is for all other values."""
    meanings = mask_format.meanings
    largest = max(255, *(high for _, high, _ in meanings))
    size = 2**24 if mask_format.encoding == "colors" else largest + 1
    table = np.full(size + 1, UNKNOWN, np.int16)
    for low, high, index in meanings:
        table[low : high + 1] = index
    return table


def spell_values(values: Iterable[int]) -> str:
    """Spells values: "0, 3-4, 255"."""
    numbers = sorted(set(values))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def read_ids(path: pathlib.Path) -> Integer[np.ndarray, "h w"]:
    """Reads the class ids in a grey or palette image, or a `.npy`, `.npz` or `.mat` file.

    Equal red, green and blue count as grey, and a constant alpha channel has no effect.

    Raises:
      UserError: the file is missing, damaged, or holds colours, transparent pixels or fractions.
    """
    is_array = path.suffix.lower() in arrays.SUFFIXES
    values = arrays.read_array(path) if is_array else images.read_values(path)
    if is_array and (values.ndim not in (2, 3) or values.shape[2:] not in ((), (1,))):
        raise UserError(
            f"{path}: must hold integers [height, width], got {values.dtype} {list(values.shape)}"
        )
    if values.ndim == 3:
        num_colors = (1, 1, 1, 3, 3)[values.shape[2]]
        colors, alpha = values[..., :num_colors], values[..., num_colors:]
        if (colors != colors[..., :1]).any():
            raise ColorsError(
                f"{path}: holds colours, not class ids. Save the ids as a grey or palette PNG."
            )
        _require_constant(path, alpha)
        values = colors[..., 0]
    return _to_whole(path, values)


def read_lossy_grey(path: pathlib.Path) -> UInt8[np.ndarray, "h w"] | None:
    """Reads grey values that a lossy format has coloured a little; None: other colours."""
    if not images.is_lossy(path):
        return None
    mask = images.decode_8_bits(images.read_bytes(path), path)
    rgb = np.asarray(mask.convert("RGB"))
    return np.asarray(mask.convert("L")) if np.ptp(rgb, axis=2).max() < _GREY_SPREAD else None


def _require_constant(path: pathlib.Path, alpha: np.ndarray) -> None:
    """Raises UserError if some pixels of a mask are more transparent than others."""
    if alpha.size and alpha.min() != alpha.max():
        raise UserError(
            f"{path}: has transparent pixels, whose class is not clear. Save the mask without "
            "alpha channel; if that channel is the mask, save it as a grey PNG."
        )


def _to_whole(path: pathlib.Path, values: np.ndarray) -> Integer[np.ndarray, "h w"]:
    """Returns numbers as uint8 or int32. Raises UserError if they are not whole numbers."""
    if values.dtype == np.uint8:  # most masks, which training reads at every step
        return values
    if values.dtype.kind == "f":
        fractions = values[values != np.floor(values)]  # and NaN
        if fractions.size:
            raise UserError(
                f"{path}: holds {fractions[0]:g}, but the values of a mask must be whole numbers. "
                "Save them as integers, in a grey PNG."
            )
    elif values.dtype.kind not in "biu":
        raise UserError(f"{path}: must hold integers, got {values.dtype}")
    if not np.can_cast(values.dtype, np.int32):
        values = values.astype(np.float64).clip(-(2**31), 2**31 - 1)
    return values.astype(np.int32)


def read_label(pair: Pair, labels: LabelSet) -> UInt8[np.ndarray, "h w"]:
    """Reads a mask of class ids and `labels.IGNORE` after checking both files of a pair.

    Raises:
      UserError: a file is missing or damaged, sizes differ, or an id is not of a class.
    """
    for path in (pair.image, pair.mask):
        if not path.is_file():
            raise UserError(f"{path}: is missing, but {pair.listed_in} names {pair.name}.")
    image_size = images.read_image(pair.image).shape[:2]
    ids = read_ids(pair.mask)
    check_ids(ids, labels, str(pair.mask))
    check_size(pair.image, image_size, pair.mask, ids.shape)
    return ids.astype(np.uint8)


def check_size(
    image: pathlib.Path, image_size: tuple[int, ...], mask: pathlib.Path, mask_size: tuple[int, ...]
) -> None:
    """Raises UserError if a mask's `(height, width)` is not that of its image."""
    if mask_size == image_size:
        return
    rotation = images.orientation(image)
    stored = f" as stored (viewers apply EXIF orientation {rotation})" if rotation != 1 else ""
    raise UserError(
        f"{mask}: is {mask_size[1]} x {mask_size[0]} pixels (width x height), but its image "
        f"{image} is {image_size[1]} x {image_size[0]}{stored}. A mask must have its image's size."
    )


def encode_label(label: UInt8[np.ndarray, "h w"]) -> bytes:
    """Encodes ids as a grey 8-bit PNG."""
    # OpenCV's default encodes faster, but its files take twice as long to decode.
    return cv2.imencode(".png", label, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def write_ids(path: pathlib.Path, ids: UInt8[np.ndarray, "h w"], labels: LabelSet) -> None:
    """Writes a palette PNG: its values are the ids, its colours those of the classes."""
    write_png(path, ids, labels.palette())


def decode_label(data: bytes) -> UInt8[np.ndarray, "h w"]:
    """Decodes a PNG of `encode_label`. For masks of other origin, use `read_ids`."""
    label = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if label is None:
        raise ValueError("not a label that encode_label wrote")
    return label
