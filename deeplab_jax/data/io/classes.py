"""`classes.txt`: the names, and colours, of the classes of a user's own masks."""

from __future__ import annotations

import pathlib
import re

from deeplab_jax.data import labels
from deeplab_jax.data.io import reading
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.utils.errors import UserError

EXAMPLE = "background\ncar\ntraffic light 250 170 30\nroad #804080"

_KNOWN = {"CamVid": labels.CAMVID, "Cityscapes": labels.CITYSCAPES, "VOC": labels.VOC}

# A name, a colour in decimal or hexadecimal, a comment; the last three may be absent.
_LINE = re.compile(
    r"(?P<name>.+?)"
    r"(?:\s+(?P<red>\d+)[\s,]+(?P<green>\d+)[\s,]+(?P<blue>\d+)|\s+#(?P<hex>[0-9a-fA-F]{6}))?"
    r"(?:\s+#(?:\s.*)?)?"
)

Color = tuple[int, int, int]


def read(path: pathlib.Path) -> LabelSet:
    """The classes that a file names, one a line, in the order of ids.

    A line is a name, which may hold spaces, and an optional colour: `car`, `car 64 0 128` or
    `car #400080`. Blank lines do not count, nor what follows a `#` and a space. Without colours,
    classes have those of a known data set whose names they are, or else VOC's.

    Raises:
      UserError: the file cannot be read, or lines are wrong; tells all of them.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8; expected a class name a line") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    names: list[str] = []
    colors: list[Color | None] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            name, color = _parse(text)
            if name in names:
                raise ValueError(f"the class {name!r} is named before")
            names.append(name)
            colors.append(color)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    reading.raise_together(f"{path}", problems)
    if not 1 <= len(names) <= labels.IGNORE:
        raise UserError(
            f"{path}: names {len(names)} classes, expected 1 to {labels.IGNORE}, one a line, "
            f"as in\n{EXAMPLE}"
        )
    plain = [name for name, color in zip(names, colors, strict=True) if color is None]
    if not plain:
        return LabelSet(tuple(names), tuple(color for color in colors if color is not None))
    if len(plain) < len(names):
        raise UserError(
            f"{path}: {', '.join(plain[:3])} has no colour, others have: give each class one, as "
            "in `car 64 0 128`, or none"
        )
    return LabelSet(tuple(names), _default_colors(names))


def _parse(text: str) -> tuple[str, Color | None]:
    match = _LINE.fullmatch(text)
    if match is None or re.search(r"\s#\S", match["name"]):
        raise ValueError(
            f"{text!r} is no class: expected a name and a colour, as in `car`, `car 64 0 128` or "
            "`car #400080`; a comment begins with `# `"
        )
    name = match["name"]
    if match["hex"]:
        value = int(match["hex"], 16)
        return name, (value >> 16, value >> 8 & 255, value & 255)
    if match["red"] is None:
        return name, None
    red, green, blue = (int(match[channel]) for channel in ("red", "green", "blue"))
    if max(red, green, blue) > 255:
        raise ValueError(f"the colour {red} {green} {blue} is not red, green and blue of 0 to 255")
    return name, (red, green, blue)


def _default_colors(names: list[str]) -> tuple[Color, ...]:
    for known in _KNOWN.values():
        if len(known.names) == len(names) and all(map(_same_name, known.names, names)):
            return known.colors
    return labels.voc_palette(len(names))


def _same_name(known: str, name: str) -> bool:
    """Whether names are alike but for case and spelling, or one begins as the other."""
    ours, theirs = (re.sub(r"[\W_]", "", text.casefold()) for text in (known, name))
    return bool(theirs) and (ours.startswith(theirs) or theirs.startswith(ours))
