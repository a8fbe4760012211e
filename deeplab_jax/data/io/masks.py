"""What the pixels of a user's masks mean: ids, colours, or 0 and 255."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np
from jaxtyping import Int16, Integer, UInt8

from deeplab_jax.data import labels as label_sets
from deeplab_jax.data.io import reading
from deeplab_jax.data.labels import IGNORE, LabelSet
from deeplab_jax.utils.errors import UserError

BINARY = label_sets.named("background", "foreground")

UNKNOWN = -1  # the id of a pixel that is neither of a class nor ignored
# Of VOC's border in pictures of its masks: the entry 255 of its colour map.
_VOC_BORDER = label_sets.voc_palette(256)[255]
_NUM_VALUES = {"ids": 256, "binary": 256, "colors": 2**24}


@dataclasses.dataclass(frozen=True)
class MaskFormat:
    """How masks are read. It pickles, and hashes.

    Attributes:
      holds: "ids": class ids; "colors": the classes' colours; "binary": 0 and 255, two classes.
      labels: names and colours of the classes.
      ignore_label: of the pixels that do not count: an id; where masks hold colours, the number
        of the colour's line in the file of classes; a grey value other than 0 and 255 where they
        are binary.
      ignored_color: the colour of that line.
    """

    holds: str
    labels: LabelSet
    ignore_label: int
    ignored_color: tuple[int, int, int] | None = None

    def read_values(self, path: pathlib.Path) -> Integer[np.ndarray, "h w"]:
        """What a mask's pixels are: ids, grey values, or colours.

        A colour is red * 65536 + green * 256 + blue.

        Raises:
          UserError: the file cannot be read, or holds colours where ids are expected.
        """
        if path.suffix.lower() == ".npy":
            return reading.read_ids(path)
        if self.holds == "colors":
            rgb = np.asarray(reading.read_picture(path).convert("RGB")).astype(np.int32)
            return rgb[:, :, 0] << 16 | rgb[:, :, 1] << 8 | rgb[:, :, 2]
        if self.holds == "binary":
            picture = reading.read_picture(path)
            # Pillow clips 16 bits rather than scaling them.
            return np.asarray(picture if picture.mode[0] == "I" else picture.convert("L"))
        try:
            return reading.read_ids(path)
        except reading.ColorsError as error:
            raise reading.ColorsError(
                f"{error} Or, if each class has a colour, set config.data.folder.masks_hold=colors "
                "and write the colours into classes.txt."
            ) from None

    def to_ids(self, values: Integer[np.ndarray, "h w"]) -> Int16[np.ndarray, "h w"]:
        """The class id of each pixel; `labels.IGNORE` where ignored, `UNKNOWN` where none."""
        table = _table(self)
        if values.dtype != np.uint8:
            values = np.where((values < 0) | (values >= len(table) - 1), len(table) - 1, values)
        return table[values]

    def read_label(self, path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
        """A mask's class ids, `labels.IGNORE` where a pixel does not count.

        Raises:
          UserError: the file cannot be read, or a pixel is of no class.
        """
        values = self.read_values(path)
        ids = self.to_ids(values)
        unknown = ids == UNKNOWN
        if unknown.any():
            held, wrong = (set(np.unique(part).tolist()) for part in (values, values[unknown]))
            hint = self.hint(held, wrong)
            if path.suffix.lower() in (".jpg", ".jpeg"):
                hint = "JPEG changes values: masks must be saved as PNG."
            raise UserError(f"{self.describe_unknown(path, values, unknown)} {hint}")
        return ids.astype(np.uint8)

    def describe_unknown(self, path: pathlib.Path, values: np.ndarray, unknown: np.ndarray) -> str:
        """Where a mask has pixels of no class, and which."""
        y, x = np.argwhere(unknown)[0]
        others = len(np.unique(values[unknown])) - 1
        several = f" and {others} others" if others else ""
        return (
            f"{path}: {self.spell(values[y, x])}{several}, first at pixel x {x}, y {y}, is neither "
            f"{self._expected(int(values[y, x]))} ({int(unknown.sum())} pixels)."
        )

    def spell(self, value: int) -> str:
        if self.holds == "colors":
            return f"colour {_split(value)}"
        return f"{'id' if self.holds == 'ids' else 'value'} {value}"

    def _expected(self, value: int) -> str:
        if self.holds == "binary":
            return "0 nor 255" + (
                f" nor {self.ignore_label}" if 0 < self.ignore_label < 255 else ""
            )
        if self.holds == "ids":
            last = self.labels.num_classes - 1
            return f"a class (0 to {last}) nor the ignore label {self.ignore_label}"
        name, color = self.nearest(value)
        return f"a class's nor ignored; nearest is {name} {color}"

    def nearest(self, value: int) -> tuple[str, tuple[int, int, int]]:
        """The class whose colour is nearest, in squares of red, green and blue."""
        distances = np.square(np.subtract(self.labels.colors, _split(value))).sum(axis=1)
        index = int(distances.argmin())
        return self.labels.names[index], self.labels.colors[index]

    def hint(self, values: set[int], unknown: set[int]) -> str:
        """What mends masks that hold these values, some of which are unknown."""
        numbers = values
        if self.holds == "colors":  # as which numbers look grey
            numbers = {value & 255 for value in values if value == (value & 255) * 0x010101}
        if len(numbers) == len(values):
            if self.holds != "binary" and numbers <= {0, 255}:
                return "For masks of 0 and 255, set config.data.folder.masks_hold=binary."
            if self.holds != "ids" and max(numbers - {255}, default=0) < 64:  # 255: void, often
                return "If the masks hold class ids, set config.data.folder.masks_hold=ids."
        if self.holds == "colors":
            return (
                "Mend the mask, or add the colour to the file of classes; if it does not count, "
                "set config.data.ignore_label to the number of its line, from 0."
            )
        if self.holds == "binary":
            return "Mend the mask, or set config.data.ignore_label to a value that does not count."
        ignored = f"={min(unknown)} if it does not count." if len(unknown) == 1 else "."
        return f"Mend the mask, name the class, or set config.data.ignore_label{ignored}"

    def meanings(self) -> dict[int, int]:
        """The class id, or `labels.IGNORE`, of each value that a pixel may have."""
        classes = range(self.labels.num_classes)
        if self.holds == "binary":
            ignored = {} if self.ignore_label in (0, 255) else {self.ignore_label: IGNORE}
            return {0: 0, 255: 1} | ignored
        if self.holds == "ids":
            return dict(zip(classes, classes, strict=True)) | {self.ignore_label: IGNORE}
        border = {} if self.ignore_label != IGNORE else {_join(_VOC_BORDER): IGNORE}
        colors = dict(zip(map(_join, self.labels.colors), classes, strict=True))
        ignored = {} if self.ignored_color is None else {_join(self.ignored_color): IGNORE}
        return border | colors | ignored


# 32 MB for colours: made at first use in each process, and not pickled.
@functools.lru_cache(maxsize=4)
def _table(mask_format: MaskFormat) -> Int16[np.ndarray, " values"]:
    """The id of each value; the last entry is for all other values."""
    table = np.full(_NUM_VALUES[mask_format.holds] + 1, UNKNOWN, np.int16)
    for value, class_id in mask_format.meanings().items():
        table[value] = class_id
    return table


def _join(color: tuple[int, int, int]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def _split(value: int) -> tuple[int, int, int]:
    return int(value) >> 16, int(value) >> 8 & 255, int(value) & 255
