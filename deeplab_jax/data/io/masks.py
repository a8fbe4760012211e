"""Mask files: class ids, class colours, or 0 and 255, decoded to class ids."""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib

import cv2
import numpy as np
from jaxtyping import Int16, Integer, UInt8

from deeplab_jax.data.dataset import Pair, check_ids
from deeplab_jax.data.io import images
from deeplab_jax.data.labels import IGNORE, LabelSet, named, voc_palette
from deeplab_jax.utils.errors import UserError

BINARY = named("background", "foreground")

UNKNOWN = -1  # the id of a pixel that is neither of a class nor ignored
# The border in VOC's masks converted to RGB: entry 255 of its colour map.
_VOC_BORDER = voc_palette(256)[255]
_NUM_VALUES = {"ids": 256, "binary": 256, "colors": 2**24}


class ColorsError(UserError):
    """A mask holds colours where class ids are expected."""


@dataclasses.dataclass(frozen=True)
class MaskFormat:
    """How masks encode classes. Pickles, and hashes.

    Attributes:
      encoding: "ids": class ids; "colors": the classes' colours; "binary": 0 and 255, two classes.
      labels: names and colours of the classes.
      ignore_label: the value of pixels that do not count. An id, for "ids"; the line number, from
        0, of their colour in the file of classes, for "colors"; a grey value other than 0 and 255,
        for "binary".
      ignored_color: the colour on that line.
    """

    encoding: str
    labels: LabelSet
    ignore_label: int
    ignored_color: tuple[int, int, int] | None = None

    def read_values(self, path: pathlib.Path) -> Integer[np.ndarray, "h w"]:
        """Reads a mask's pixels: ids, grey values, or colours as red * 65536 + green * 256 + blue.

        Raises:
          UserError: the file cannot be read, or holds colours where ids are expected.
        """
        if self.encoding == "ids" or path.suffix.lower() == ".npy":
            try:
                return read_ids(path)
            except ColorsError as error:
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

    def to_ids(self, values: Integer[np.ndarray, "h w"]) -> Int16[np.ndarray, "h w"]:
        """Converts values to class ids, `labels.IGNORE` and `UNKNOWN`."""
        table = _id_table(self)
        if values.dtype != np.uint8:
            values = np.where((values < 0) | (values >= len(table) - 1), len(table) - 1, values)
        return table[values]

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
            else:
                found = set(np.unique(values).tolist())
                fix = self.suggest_fix(found, set(np.unique(values[unknown]).tolist()))
            raise UserError(f"{self.describe_unknown(path, values, unknown)} {fix}")
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
            distances = np.square(np.subtract(self.labels.colors, _to_rgb(value))).sum(axis=1)
            nearest = int(distances.argmin())
            expected = (
                "the colour of a class nor ignored; nearest is "
                f"{self.labels.names[nearest]} {self.labels.colors[nearest]}"
            )
        elif self.encoding == "ids":
            last = self.labels.num_classes - 1
            expected = f"a class (0 to {last}) nor the ignore label {self.ignore_label}"
        else:
            ignored = f" nor {self.ignore_label}" if 0 < self.ignore_label < 255 else ""
            expected = f"0 nor 255{ignored}"
        return (
            f"{path}: {self.describe_value(value)}{others}, first at pixel x {x}, y {y}, is "
            f"neither {expected} ({int(unknown.sum())} pixels)."
        )

    def describe_value(self, value: int) -> str:
        """Describes a value: "id 3", "value 128" or "colour (1, 2, 3)"."""
        if self.encoding == "colors":
            return f"colour {_to_rgb(value)}"
        return f"{'id' if self.encoding == 'ids' else 'value'} {value}"

    def suggest_fix(self, values: set[int], unknown: set[int]) -> str:
        """Suggests a fix for masks with pixels of no class.

        Args:
          values: all values in the masks.
          unknown: those of no class.
        """
        numbers = values
        if self.encoding == "colors":  # the numbers that look grey
            numbers = {value & 255 for value in values if value == (value & 255) * 0x010101}
        if len(numbers) == len(values):
            if self.encoding != "binary" and numbers <= {0, 255}:
                return "For masks of 0 and 255, set config.data.folder.masks_hold=binary."
            if self.encoding != "ids" and max(numbers - {255}, default=0) < 64:  # 255: often void
                return "If the masks hold class ids, set config.data.folder.masks_hold=ids."
        if self.encoding == "colors":
            return (
                "Fix the mask, or add the colour to the file of classes; if it does not count, "
                "set config.data.ignore_label to the number of its line, from 0."
            )
        greys = {color[0] for color in self.labels.colors if len(set(color)) == 1}
        if self.encoding == "ids" and unknown <= greys:
            return "If the masks hold colours, set config.data.folder.masks_hold=colors."
        if min(unknown) < 0 or max(unknown) > 255:
            return "Values must be 0 to 255: change the others, and save 8 bits per pixel."
        if self.encoding == "binary":
            return "Fix the mask, or set config.data.ignore_label to a value that does not count."
        ignored = f"={min(unknown)} if it does not count." if len(unknown) == 1 else "."
        return f"Fix the mask, name the class, or set config.data.ignore_label{ignored}"


# 32 MB for colours: made at first use in each process, and not pickled.
@functools.lru_cache(maxsize=4)
def _id_table(mask_format: MaskFormat) -> Int16[np.ndarray, " values"]:
    """The id of each value; the last entry is for all other values."""
    table = np.full(_NUM_VALUES[mask_format.encoding] + 1, UNKNOWN, np.int16)
    classes = np.arange(mask_format.labels.num_classes)
    ignore_label = mask_format.ignore_label
    if mask_format.encoding == "ids":
        table[classes] = classes
        table[ignore_label] = IGNORE
    elif mask_format.encoding == "binary":
        table[ignore_label] = IGNORE
        table[[0, 255]] = 0, 1
    else:
        if ignore_label == IGNORE:
            table[_from_rgb(_VOC_BORDER)] = IGNORE
        table[[_from_rgb(color) for color in mask_format.labels.colors]] = classes
        if mask_format.ignored_color is not None:
            table[_from_rgb(mask_format.ignored_color)] = IGNORE
    return table


def _from_rgb(color: tuple[int, int, int]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def _to_rgb(value: int) -> tuple[int, int, int]:
    return value >> 16, value >> 8 & 255, value & 255


def read_ids(path: pathlib.Path) -> Integer[np.ndarray, "h w"]:
    """Reads the class ids in a grey or palette image, a `.npy` file, or a `.mat` file of SBD.

    Equal red, green and blue count as grey, and a constant alpha channel has no effect.

    Raises:
      UserError: the file is missing, damaged, or holds colours, transparent pixels or fractions.
    """
    if path.suffix == ".mat":
        return _read_sbd_ids(path)
    is_array = path.suffix.lower() == ".npy"
    values = images.read_array(path) if is_array else images.read_values(path)
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


def _read_sbd_ids(path: pathlib.Path) -> np.ndarray:
    """Reads `GTcls.Segmentation` of a file in `benchmark_RELEASE/dataset/cls`."""
    import scipy.io  # takes 0.25 s, and other data sets do not need it

    data = images.read_bytes(path)
    try:
        variables = scipy.io.loadmat(io.BytesIO(data), variable_names=["GTcls"])
    except Exception as error:  # SciPy's parser raises errors of many types
        raise UserError(
            f"{path}: truncated, or not a MATLAB file ({error}). Replace the file."
        ) from None
    ground_truth = variables.get("GTcls")
    fields = getattr(getattr(ground_truth, "dtype", None), "names", None) or ()
    if ground_truth is None or "Segmentation" not in fields:
        raise UserError(
            f"{path}: has no GTcls.Segmentation. SBD's class masks are in benchmark_RELEASE/"
            "dataset/cls; those in dataset/inst hold instances."
        )
    ids = ground_truth["Segmentation"].flat[0]
    if ids.ndim != 2 or not np.array_equal(ids, ids.astype(np.int32)):
        raise UserError(f"{path}: GTcls.Segmentation is not a matrix of class ids")
    return ids.astype(np.int32)


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
    return cv2.imencode(".png", label)[1].tobytes()


def decode_label(data: bytes) -> UInt8[np.ndarray, "h w"]:
    """Decodes a PNG of `encode_label`. For masks of other origin, use `read_ids`."""
    label = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if label is None:
        raise ValueError("not a label that encode_label wrote")
    return label
