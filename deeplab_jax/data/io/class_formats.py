"""Files that name classes, as other tools and data sets write them; the content tells which."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from deeplab_jax.data.labels import is_background

EXPECTED = (
    "expected a name and, optionally, the values or colours of its pixels in masks, as in `car`, "
    "`car 7`, `car 0-127 255`, `car 64 0 128` or `car #400080`; a comment begins with `# `"
)

# More values in a mask are no classes, but instances or a photo; lower ones are probably ids.
MAX_CLASSES = 64

Range = tuple[int, int]  # first and last of the values


@dataclasses.dataclass(frozen=True)
class Entry:
    """A class, or with the name "ignore" and values what does not count.

    Attributes:
      line: number of the line that names it.
      name: its name.
      values: of its pixels in masks; empty: the number of classes named before it.
      colors: of its pixels in masks, as red * 65536 + green * 256 + blue.
      train_values: of its pixels in masks of training ids (Cityscapes).
    """

    line: int
    name: str
    values: tuple[Range, ...] = ()
    colors: tuple[int, ...] = ()
    train_values: tuple[Range, ...] = ()

    @property
    def is_ignored(self) -> bool:
        return self.name.casefold() == "ignore" and bool(self.values or self.colors)


Parsed = tuple[str, list[Entry]]  # what the file is, and what it names
Line = tuple[int, str]  # number and text
Row = tuple[int, dict[str, Any]]  # number of a line, and its fields by the names of their columns

# Formats in which all lines have one form: description, form of a line.
_LINES = (
    ("CVAT's labelmap", r"(?P<name>[^:]+):(?P<color>\d+\s*,\s*\d+\s*,\s*\d+):[^:]*:[^:]*"),
    (
        "lines of red, green, blue, name",
        r"(?P<color>\d+[\s,;]+\d+[\s,;]+\d+)[\s,;:]+(?P<name>[^\d\s].*)",
    ),
    (
        "lines of name,red,green,blue",
        r"(?P<name>[^,;\t]+)[,;\t]\s*(?P<color>\d+\s*[,;\t]\s*\d+\s*[,;\t]\s*\d+)",
    ),
    ("lines of value and name", r"(?P<id>\d+)(?:\s*[:,;=.)\t]\s*|\s+)(?P<name>[^\d\s].*)"),
    ("lines of name and value", r"(?P<name>[^,;:\t]+?)\s*[:,;\t]\s*(?P<id>\d+)"),
)
_CITYSCAPES = re.compile(  # a line of labels.py
    r"^\s*Label\(\s*['\"](?P<name>[^'\"]+)['\"]\s*,\s*(?P<id>-?\d+)\s*,\s*(?P<trainid>-?\d+)\s*,"
    r".*\(\s*(?P<color>\d+\s*,\s*\d+\s*,\s*\d+)",
    re.M,
)
# Names of columns, without spaces and punctuation; the first that a table has counts.
_NAMES = ("name", "classname", "labelname", "title", "class", "label", "category", "categoryname")
_VALUES = ("pixelvalue", "value", "id", "classid", "labelid", "idx", "index", "pixel", "label")
_CHANNELS = (("r", "g", "b"), ("red", "green", "blue"))
_COLORS = ("color", "colour", "rgb", "hex", "colorrgb", "rgbcolor")

_TOKEN = r"(?:#[0-9a-fA-F]{6}|\d+(?:-\d+)?)"
_PLAIN = re.compile(rf"(?P<name>.+?)(?P<tokens>\s+{_TOKEN}(?:[\s,]+{_TOKEN})*)?")
_STATED = re.compile(rf"(?P<name>[^=]*[^=\s])\s*=\s*(?P<tokens>{_TOKEN}(?:[\s,]+{_TOKEN})*)")
# Tables, directives, settings, files, boxes, and colours in other forms, which are no names.
_NO_NAME = re.compile(
    r"\s#\S|\d\s*[,;\s]\s*\d+\s*[,;\s]\s*\d|[\t;|={}<>]|,\S|:(\s|$)|^([\[%]|- |//)|^#?include\b"
    r"|\.(jpe?g|png)$|\d\s+\d*\.\d|[\x00-\x1f\x7f]"
)
# A number after these is a part of the name.
_NUMBERED = ("class", "label", "category", "type", "object", "zone", "part", "level", "stage")


def parse(text: str) -> Parsed:
    """Parses a file of classes.

    Raises:
      ValueError: lines are no classes; its arguments are the problems.
    """
    if text.lstrip()[:1] in ("{", "["):
        try:
            return "JSON of categories", _entries(_json_rows(json.loads(text)))
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                "is not a JSON of classes: expected COCO's categories, as in "
                f'[{{"id": 1, "name": "car"}}], or names by id ({error})'
            ) from None
    if labels := [*_CITYSCAPES.finditer(text)]:
        numbers = [text.count("\n", 0, label.start()) + 1 for label in labels]
        rows = zip(numbers, (label.groupdict() for label in labels), strict=True)
        return "Cityscapes' table", _entries([*rows])
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(n, line) for n, line in lines if line and not re.match(r"#(?!include\b)", line)]
    return _parse_table(lines) or _parse_lines(lines) or ("", _parse_plain(lines))


def _json_rows(data: Any) -> list[Row]:
    """Returns rows of COCO's categories or Supervisely's classes, names by id or ids by name."""
    if isinstance(data, dict):
        keys = ("categories", "classes", "id2label")
        data = next((data[key] for key in keys if key in data), data)
    if isinstance(data, dict):
        by_id = all(key.isdecimal() for key in data)
        pairs = [(name, key) if by_id else (key, name) for key, name in data.items()]
        data = [{"name": name, "id": int(value)} for name, value in pairs]
    return [(1, {"name": row} if isinstance(row, str) else dict(row)) for row in data]


def _parse_table(lines: Sequence[Line]) -> Parsed | None:
    """Parses a table whose first line names columns: a name, and values or colours."""
    if len(lines) < 2:
        return None
    (number, header), *body = lines
    separator = max(",;\t|", key=header.count)
    first, *cells = csv.reader(
        (line for _, line in lines), delimiter=separator, skipinitialspace=True
    )
    columns = [re.sub(r"[\W_]", "", cell.casefold()) for cell in first]
    if not set(columns) & set(_NAMES):
        return None
    rows = [
        (number, dict(zip(columns, map(str.strip, row), strict=False)))
        for (number, _), row in zip(body, cells, strict=False)
    ]
    if len(columns) > 1 and not any(_value_columns(columns)):
        if columns[0] not in _NAMES:
            return None
        raise ValueError(
            f"line {number}: {header!r} is not a class, but names columns, and none of them has "
            "values or colours"
        )
    entries = _entries(rows, f"the columns {header!r}")
    if "trainid" in columns:
        return "Cityscapes' table", entries
    if {"idx", "ratio", "stuff"} <= set(columns):  # ADE20K's objectInfo150.txt: 0 is "other"
        return "ADE20K's table", [*entries, Entry(1, "ignore", ((0, 0),))]
    return f"a table of {header}", entries


def _first(names: Iterable[str], columns: Iterable[str]) -> str:
    return next((name for name in names if name in columns), "")


def _value_columns(columns: Iterable[str]) -> tuple[str, list[str]]:
    """Returns the column of values, and that or those of colours; both may be empty."""
    name = _first(_NAMES, columns)
    value = _first([each for each in _VALUES if each != name], columns)
    channels = next((each for each in _CHANNELS if set(each) <= set(columns)), ())
    return value, [*channels] or [each for each in [_first(_COLORS, columns)] if each]


def _entries(rows: Sequence[Row], form: str = "the first") -> list[Entry]:
    """Returns the classes in rows. If they have training ids, these order and select them."""
    columns = rows[0][1]
    value, colors = _value_columns(columns)
    entries: list[tuple[int, Entry]] = []
    problems = []
    for line, fields in rows:
        try:
            name = str(fields[_first(_NAMES, columns)]).strip()
            number = str(fields[value]) if value else ""
            values = _ranges(re.findall(r"(?<!-)\b\d+(?:-\d+)?", number))
            if value and not values and not number.startswith("-"):  # no pixel is negative
                raise ValueError
            channels = " ".join(str(fields[column]) for column in colors)
            color = (_color(re.findall(r"[0-9a-fA-F]{6}|\d+", channels)),) if colors else ()
            train = int(fields.get("trainid", 0))
        except (KeyError, ValueError):
            text = ",".join(map(str, fields.values()))
            problems.append(f"line {line}: {text!r} does not fit {form}")
            continue
        is_used = 0 <= train < 255
        trained = ((train, train),) if "trainid" in fields and train >= 0 else ()
        entry = Entry(line, name if is_used else "ignore", values, color, trained)
        if values or not value:
            entries.append((train if is_used else 255, entry))
    if problems:
        raise ValueError(*problems)
    return [entry for _, entry in sorted(entries, key=lambda each: each[0])]


def _parse_lines(lines: Sequence[Line]) -> Parsed | None:
    """Parses lines that all have one of the forms of `_LINES`."""
    if lines and lines[0][1].lower().startswith("label:color"):
        lines = lines[1:]
    for kind, form in _LINES:
        matches = [(number, re.fullmatch(form, line)) for number, line in lines]
        rows = [(number, match.groupdict()) for number, match in matches if match]
        are_distinct = len({fields["name"].strip() for _, fields in rows}) == len(lines)
        # A single line of a name and a number may be a name of two words.
        if are_distinct and (len(rows) > 1 or (rows and "color" in rows[0][1])):
            return kind, _entries(rows)
    return None


def _parse_plain(lines: Sequence[Line]) -> list[Entry]:
    """Parses the grammar of classes.txt, see `classes.read`."""
    rows: list[tuple[int, str, list[str], list[str], bool]] = []
    problems = []
    for number, line in lines:
        text = re.sub(r"\s+#(\s.*)?$", "", line)
        match = _STATED.fullmatch(text) or _PLAIN.fullmatch(text)
        name, tokens = match.groups() if match else ("", None)
        if not match or _NO_NAME.search(name) or (name.isdecimal() and tokens):
            problems.append(f"line {number}: {text!r} is not a class: {EXPECTED}")
        elif name != "__ignore__":  # labelme's, which has the id -1
            colors = re.findall(r"#(\w+)", tokens or "")
            values = re.findall(r"[\d-]+", re.sub(r"#\w+", "", tokens or ""))
            rows.append((number, name, values, colors, match.re is _STATED))
    commas = {name.count(",") for _, name, *_ in rows}
    if len(rows) > 1 and len(commas) == 1 and max(commas) > 1:
        problems.append(f"line {lines[0][0]}: {lines[0][1]!r} is not a class: {EXPECTED}")
    if problems:
        raise ValueError(*problems)
    # Three numbers on every line are colours; the first of four is a part of the name.
    has_colors = {
        3 <= sum(map(str.isdecimal, values)) <= 4 and not is_stated
        for _, name, values, colors, is_stated in rows
        if not colors and not (values and name.casefold() == "ignore")
    } == {True}
    times = Counter(name for _, name, *_ in rows)
    entries = []
    for number, name, values, colors, is_stated in rows:
        channels: list[str] = []
        if has_colors and len(values) >= 3 and not is_stated:
            values, channels = values[:-3], values[-3:]
        if values and not is_stated and (times[name] > 1 or name.casefold() in _NUMBERED):
            name = f"{name} {values.pop(0)}"
        try:
            ids = tuple(_color(color) for color in (*zip(colors, strict=True), channels) if color)
            entries.append(Entry(number, name, _ranges(values), ids))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise ValueError(*problems)
    return entries


def _color(numbers: Sequence[str]) -> int:
    """Returns red * 65536 + green * 256 + blue, of three numbers or six hexadecimal digits."""
    if len(numbers) == 1:
        return int(numbers[0], 16)
    if len(numbers) != 3 or max(map(int, numbers)) > 255:
        raise ValueError(f"the colour {' '.join(numbers)} is not three numbers of 0 to 255")
    return from_rgb([*map(int, numbers)])


def from_rgb(color: Sequence[int]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def to_rgb(value: int) -> tuple[int, int, int]:
    return value >> 16, value >> 8 & 255, value & 255


def _ranges(tokens: Sequence[str]) -> tuple[Range, ...]:
    ranges = []
    for token in tokens:
        first, _, last = token.partition("-")
        ranges.append((int(first), int(last or first)))
        if not ranges[-1][0] <= ranges[-1][1] <= 65535:
            raise ValueError(f"{token} is not a range of values, which are 0 to 65535")
    return tuple(ranges)


def spell_class(name: str, values: Iterable[str]) -> str:
    """Returns the line of classes.txt for a class; its values are "7", "0-127" or "#400080"."""
    ends_in_value = re.fullmatch(rf".*\s{_TOKEN}", name) or name.casefold() in _NUMBERED
    return f"{name} {'= ' if ends_in_value else ''}{' '.join(values)}"


def two_readings(names: Sequence[str], values: Iterable[int]) -> str:
    """Returns the lines of both readings of ids 0 to the number of names; "": others fit.

    One value more than names, none of which is the background, is 0 without a name, or void at the
    end, as 11 is beside CamVid's classes: the names of one reading are shifted in the other.
    """
    last, numbers = len(names), {*values}
    if last < 2 or numbers - {255} != {*range(last + 1)} or any(map(is_background, names)):
        return ""
    first, second = (
        "\n".join(spell_class(name, [f"{i}"]) for i, name in enumerate(names, start=start))
        for start in (1, 0)
    )
    void = " 255" * (255 in numbers)
    border = f"\nignore{void}" * bool(void)
    return (
        f"there is one value more than the {last} names, which has two readings. Write the right "
        f"one into classes.txt. If 0 is the background, and {names[0]} is 1:\nbackground 0\n{first}"
        f"{border}\nIf {names[0]} is 0, and {last} does not count:\n{second}\nignore {last}{void}"
        f"\nThe second is also config.data.ignore_label={last}"
    )


def assign_names(names: Sequence[str], values: Iterable[int]) -> str:
    """Returns lines of classes.txt that give values to names in their order.

    255 may be left out as ignored, and 0 as a background without name. Returns "" if the numbers of
    names and values do not match, or most values are ids already, and the others are mistakes, or
    there are two readings.
    """
    numbers = sorted(values)
    num_ids = sum(0 <= number < len(names) for number in numbers)
    if not numbers or numbers[0] < 0 or numbers[-1] > 65535 or two_readings(names, numbers):
        return ""
    if 2 * num_ids > len(names) and np.ptp([n for n in numbers if n != 255]) >= len(numbers):
        return ""
    before, after = [], []
    if len(numbers) > max(2, len(names)) and numbers[-1] == 255 and numbers[-2] < MAX_CLASSES:
        numbers, after = numbers[:-1], ["ignore 255"]
    if len(numbers) == len(names) + 1 and numbers[0] == 0 and not any(map(is_background, names)):
        numbers, before = numbers[1:], ["background 0"]
    if len(numbers) != len(names):
        return ""
    lines = [spell_class(name, [f"{value}"]) for name, value in zip(names, numbers, strict=True)]
    return "\n".join([*before, *lines, *after])
