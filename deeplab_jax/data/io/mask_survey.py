"""What a user's masks hold, without knowing how they encode classes, and a `classes.txt` for it."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from deeplab_jax.data import labels
from deeplab_jax.data.io import images, masks
from deeplab_jax.data.io.class_formats import (
    MAX_CLASSES,
    assign_names,
    from_rgb,
    spell_class,
    two_readings,
)
from deeplab_jax.data.io.classes import ClassTable
from deeplab_jax.data.labels import IGNORE, is_background
from deeplab_jax.utils.errors import UserError

_BINARY = masks.BINARY.names
_LOSSY = (
    "JPEG changes values, as all lossy formats do, so that these classes cannot be told apart: "
    "save masks as PNG"
)
_GUESS = "# which colour is of which name is a guess: compare images and masks\n"
_MAX_COLORS = 4096  # of a mask that are kept
_PEAK = 0.02  # fraction of the pixels of a grey level that is a class, in a lossy format
_FAR = 24  # grey levels between two of them


@dataclasses.dataclass(frozen=True)
class MaskSample:
    """What a mask holds.

    Attributes:
      path: the file.
      kind: "1 bit", "grey", "rgb" (equal red, green and blue), "palette" or "colors"; arrays are
        "grey".
      numbers: number of pixels of each stored value, of a palette its indices; empty for colours.
      shown: the colour of each stored value, as viewers show it; empty for arrays and colours.
      colors: what it shows, as red * 65536 + green * 256 + blue; empty for arrays.
      is_lossy: whether the format changes values.
    """

    path: pathlib.Path
    kind: str
    numbers: dict[int, int]
    shown: dict[int, int]
    colors: frozenset[int]
    is_lossy: bool = False

    @property
    def greys(self) -> set[int]:
        """The values that the mask shows: 0 and 255 if it has one bit per pixel."""
        return {255 * value for value in self.numbers} if self.kind == "1 bit" else {*self.numbers}


def sample_mask(path: pathlib.Path) -> MaskSample:
    """Reads a mask, and counts its values.

    Raises:
      UserError: the file cannot be read, or is no mask of any kind.
    """
    is_lossy = images.is_lossy(path)
    try:
        values = masks.read_ids(path)
    except masks.ColorsError:
        grey = masks.read_lossy_grey(path)
        if grey is None:
            found = np.unique(_read_colors(path))[:_MAX_COLORS]
            return MaskSample(path, "colors", {}, {}, frozenset(found.tolist()), is_lossy)
        values = grey
    found, counts = np.unique(values, return_counts=True)
    numbers = dict(zip(found[:_MAX_COLORS].tolist(), counts.tolist(), strict=False))
    try:
        with images.open_image(path) as image:
            kinds = {"1": "1 bit", "P": "palette", "PA": "palette", "RGB": "rgb", "RGBA": "rgb"}
            kind = kinds.get(image.mode, "grey")
    except Exception:  # an array, or what Pillow cannot read
        return MaskSample(path, "grey", numbers, {}, frozenset())
    shown = {value: value * (0xFFFFFF if kind == "1 bit" else 0x010101) for value in numbers}
    if kind == "palette":
        first = np.unique(values, return_index=True)[1]
        shown = dict(zip(numbers, _read_colors(path).ravel()[first].tolist(), strict=True))
    return MaskSample(path, kind, numbers, shown, frozenset(shown.values()), is_lossy)


def try_to_sample(path: pathlib.Path) -> MaskSample | None:
    try:
        return sample_mask(path)
    except UserError:  # the check, or training where it reads the file, says what is wrong
        return None


def _read_colors(path: pathlib.Path) -> np.ndarray:
    rgb = np.asarray(images.decode_8_bits(images.read_bytes(path), path).convert("RGB"))
    return rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def numbers_in(samples: Iterable[MaskSample]) -> set[int]:
    return set().union(*(sample.numbers for sample in samples))


def colors_in(samples: Iterable[MaskSample]) -> set[int]:
    return set().union(*(sample.colors for sample in samples))


def describe(samples: Sequence[MaskSample], limit: int = 20) -> str:
    """Lists what masks hold: "0, 3, 4, 255", or colours."""
    colors = colors_in(sample for sample in samples if sample.kind == "colors")
    shown = [*map(str, sorted(numbers_in(samples))), *(f"#{color:06x}" for color in sorted(colors))]
    return ", ".join(shown[:limit]) + f" and {len(shown) - limit} others" * (len(shown) > limit)


def propose_classes(
    samples: Sequence[MaskSample], table: ClassTable | None = None, ignore_label: int = IGNORE
) -> str:
    """Returns a `classes.txt` that gives every value in masks to a class.

    Args:
      samples: of all masks, or of those that are known.
      table: a file of classes that does not fit the masks. Its classes keep their order.
      ignore_label: a value that needs no line, if it is not 255.

    Raises:
      UserError: the masks are of two kinds, hold too many values or values that a lossy format has
        changed, or the names have two readings.
    """
    names = table.labels.names if table and not table.states_values else ()
    if any(sample.kind == "colors" for sample in samples):
        owned = [color for color, _, i in table.colors if i < IGNORE] if table else []
        if table and len({*owned}) < len(owned):  # one of the names would be lost
            raise UserError(f"{table.path}: classes have one colour")
        known = (
            table.names_of(sorted(table.colors, key=lambda each: each[2] < IGNORE)) if table else {}
        )
        return _propose_colors(samples, names, known)
    counts: Counter[int] = Counter()
    for sample in samples:
        counts.update(sample.numbers)
    if ignore_label != IGNORE and len(counts) > 1:
        counts.pop(ignore_label, None)
    values = set(counts)
    if any(sample.is_lossy for sample in samples):
        return _propose_lossy(counts, samples, names)
    binary = _second_class(values, samples)
    if readings := two_readings(names, values):
        raise UserError(readings)
    assigned = assign_names(names, values) if names else ""
    if assigned and not (binary and 255 in values):
        return f"{assigned}\n"
    if binary and not (table and table.states_values):
        first, second = {1: (_BINARY[0], *names), 2: names}.get(len(names), _BINARY)
        zero = "0-127" if binary == ["128-255"] else "0"
        return f"{spell_class(first, [zero])}\n{spell_class(second, binary)}\n"
    most = max(len(sample.numbers) for sample in samples)
    if max(most, len(values) // 4) > MAX_CLASSES or min(values) < 0:
        raise UserError(
            f"the masks hold {len(values)} values ({describe(samples)}), too many for classes: "
            "they may be instances, or photos. Give masks of classes, or, if values from one on "
            "are the second of two classes, set config.data.folder.threshold to it"
        )
    known = _known_values(values, table) if table else {}
    if ignore_label != IGNORE:
        known.pop(ignore_label, None)
    comment = "# a trimap of Oxford-IIIT Pet: 1 animal, 2 background, 3 border\n"
    return comment * (not table and values == {1, 2, 3}) + _propose_values(values, known)


def _known_values(values: set[int], table: ClassTable) -> dict[int, str]:
    """Returns the names of values in a table that does not fit all values of the masks."""
    known, names = table.names_of(table.values), table.labels.names
    if table.states_values:
        return known
    are_from_1 = 0 not in values and values >= {*range(1, len(names) + 1)}
    if are_from_1 and not is_background(names[0]):  # which has the id 0
        return dict(enumerate(names, start=1))
    # Of so few names, the ids are others, as of Cityscapes' 19 classes among 34 ids.
    return {} if len(values - known.keys()) > max(4, len(names) // 2) else known


def _propose_values(values: set[int], known: dict[int, str]) -> str:
    """Returns the classes of known values, and a class for each other value."""
    unknown = sorted(values - known.keys())
    # 255 beside ids 0, 1, ... or far from all others is ignored, as in VOC's masks.
    if 255 in unknown and len(values) > 2 and max(values - {255}) < MAX_CLASSES:
        known[255] = "ignore"
    if unknown[:1] == [0] and not any(map(is_background, known.values())):
        known = {0: _BINARY[0]} | known
    known |= {value: f"class_{value}" for value in unknown if value not in known}
    return _spell(known, lambda numbers: masks.spell_values(numbers).replace(",", ""))


def _spell(names: Mapping[int, str], spell: Callable[[list[int]], str]) -> str:
    """Returns lines of names and their values or colours; what is ignored is the last."""
    by_name: dict[str, list[int]] = {}
    for value, name in names.items():
        by_name.setdefault(name, []).append(value)
    if "ignore" in by_name:
        by_name["ignore"] = by_name.pop("ignore")
    return "".join(f"{spell_class(name, [spell(by_name[name])])}\n" for name in by_name)


def _second_class(values: set[int], samples: Sequence[MaskSample]) -> list[str]:
    """Returns the values of the second of two classes, the first being 0; none: other classes."""
    others = sorted(values - {0})
    if others and all(sample.kind == "1 bit" for sample in samples):
        return ["1"]
    if 0 not in values or others[-1:] not in ([255], [65535]):
        return []
    *middle, last = others
    if not middle:
        return [f"{last}"]
    if np.diff([0, *others]).min() >= _FAR:  # grey levels, each of which is a class
        return []
    if max(middle) >= MAX_CLASSES:  # if there are many, edges of masks that were resized
        return ["128-255"] if len(others) > 16 and last == 255 else []
    if any(sample.kind == "palette" for sample in samples):
        return []
    if middle == list(range(1, len(middle) + 1)):
        # Ids, beside which 255 does not count; but not if some masks hold ids, others 0 and 255.
        beside = any(255 in s.numbers and s.numbers.keys() & set(middle) for s in samples)
        is_binary = not beside and any(s.numbers.keys() - {0} == {255} for s in samples)
    else:
        # The pixels of 255 are most of the second class, but few beside ids, as VOC's borders.
        counts = [sum(s.numbers.get(value, 0) for s in samples) for value in others]
        is_binary = 2 * counts[-1] > sum(counts)
    return list(map(str, others)) if is_binary else []


def _propose_lossy(
    counts: Counter[int], samples: Sequence[MaskSample], names: Sequence[str]
) -> str:
    """Returns classes with ranges of grey values, half way between the frequent ones."""
    total = sum(counts.values())
    peaks: list[int] = []
    for value, count in counts.most_common():
        if count >= _PEAK * total and all(abs(value - peak) >= _FAR for peak in peaks):
            peaks.append(value)
    if len(peaks) < 2 and min(counts) < _FAR and max(counts) > 255 - 2 * _FAR:
        peaks = [0, 255]  # thin objects: all their pixels are near an edge
    if len(names) == 1 and len(peaks) == 2:
        names = (_BINARY[0], *names)
    if not 2 <= len(peaks) <= 8 or max(peaks) < MAX_CLASSES or len(names) not in (0, len(peaks)):
        raise UserError(f"{samples[0].path}: {_LOSSY}")
    peaks.sort()
    bounds = [0, *((low + high + 1) // 2 for low, high in itertools.pairwise(peaks)), 256]
    if not names:
        names = [_BINARY[0] if peak < _FAR else f"class_{peak}" for peak in peaks]
        names = _BINARY if len(peaks) == 2 else names
    ranges = [[f"{low}-{high - 1}"] for low, high in itertools.pairwise(bounds)]
    return "".join(f"{spell_class(*row)}\n" for row in zip(names, ranges, strict=True))


def _propose_colors(
    samples: Sequence[MaskSample], names: Sequence[str], known: dict[int, str]
) -> str:
    colors = colors_in(samples)
    if mixture := describe_mixture(samples):
        raise UserError(mixture)
    lossy = next((sample for sample in samples if sample.is_lossy), None)
    if lossy:
        raise UserError(f"{lossy.path}: {_LOSSY}")
    if len(colors) > MAX_CLASSES:
        raise UserError(
            f"{samples[0].path}: the masks hold {len(colors)} colours, too many for classes: are "
            "these masks, not photos or pictures of masks?"
        )
    usual = {from_rgb(color): i for i, color in enumerate(labels.voc_palette(255))}
    border = from_rgb(masks.VOC_BORDER)
    order = sorted(colors - {border}, key=lambda color: (usual.get(color, 255), color))
    if len(order) == len(names) + 1 and order[0] == 0 and not any(map(is_background, names)):
        names = (_BINARY[0], *names)
    is_ordered = len(names) == len(order) and not known
    if is_ordered:
        known = dict(zip(order, names, strict=True))
    known = known or {color: _BINARY[0] for color in order if color == 0}
    for color in order:
        known.setdefault(color, f"class_{len({*known.values()} - {'ignore'})}")
    if border in colors:
        known.setdefault(border, "ignore")
    is_guess = is_ordered and [usual.get(color) for color in order] != [*range(len(order))]
    lines = _spell(known, lambda colors: " ".join(f"#{color:06x}" for color in colors))
    return _GUESS * (is_guess and len({*order} - {0}) > 1) + lines


def describe_mixture(samples: Sequence[MaskSample]) -> str:
    """Names masks of colours and of ids among the samples; empty: there are not both."""
    colored = next((sample for sample in samples if sample.kind == "colors"), None)
    others = [sample for sample in samples if sample.kind not in ("colors", "rgb")]
    other = next((s for s in others if s.kind == "palette" or not s.greys <= {0, 255}), None)
    if colored is None or other is None:
        return ""
    return (
        f"masks are of two encodings: {colored.path} holds colours ({describe([colored], 6)}), but "
        f"{other.path} holds numbers ({describe([other], 6)}). Save all in one of them"
    )
