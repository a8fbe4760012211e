"""`classes.txt`: names and colours of the classes in a user's own masks."""

from __future__ import annotations

import pathlib
import re

from deeplab_jax.data import labels
from deeplab_jax.data.io.lists import read_text
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.utils.errors import UserError, raise_problems

EXAMPLE = "background\ncar\ntraffic light 250 170 30\nroad #804080"

# A name; a colour, decimal or hexadecimal; a comment. The last two are optional.
_LINE = re.compile(
    r"(?P<name>.+?)"
    r"(?:\s+(?P<red>\d+)[\s,]+(?P<green>\d+)[\s,]+(?P<blue>\d+)|\s+#(?P<hex>[0-9a-fA-F]{6}))?"
    r"(?:\s+#(?:\s.*)?)?"
)
# Three numbers, as in `car,64,0,128` and `car (64, 0, 128)`.
_COLOR_IN_NAME = r"\d\s*[,;\s]\s*\d+\s*[,;\s]\s*\d"

Color = tuple[int, int, int]


def read(path: pathlib.Path) -> LabelSet:
    """Reads a file of classes, one per line in the order of their ids.

    A line is a name, which may contain spaces, and an optional colour: `car`, `car 64 0 128` or
    `car #400080`. Blank lines and comments (from a `#` and a space to the end of the line) are
    skipped. Classes without colours get those of the data set with the same class names (CamVid,
    Cityscapes or VOC), else those of VOC's colour map.

    Raises:
      UserError: the file cannot be read, or has wrong lines, all of which are listed.
    """
    lines = read_text(path).splitlines()
    classes: dict[str, Color | None] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            name, color = _parse(text)
            if name in classes:
                raise ValueError(f"the class {name!r} is already named")
            classes[name] = color
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    raise_problems(f"{path}", problems)
    if not 1 <= len(classes) <= labels.IGNORE:
        raise UserError(
            f"{path}: names {len(classes)} classes, expected 1 to {labels.IGNORE}, one per line, "
            f"as in\n{EXAMPLE}"
        )
    names = tuple(classes)
    colors = tuple(color for color in classes.values() if color is not None)
    if colors and len(colors) < len(names):
        plain = [name for name, color in classes.items() if color is None]
        raise UserError(
            f"{path}: {', '.join(plain[:3])} has no colour, but others have. Give all classes a "
            "colour, as in `car 64 0 128`, or none"
        )
    return LabelSet(names, colors or _default_colors(names))


def _parse(text: str) -> tuple[str, Color | None]:
    match = _LINE.fullmatch(text)
    if match is None or re.search(r"\s#\S|" + _COLOR_IN_NAME, match["name"]):
        raise ValueError(
            f"{text!r} is not a class: expected a name and an optional colour, as in `car`, "
            "`car 64 0 128` or `car #400080`; a comment begins with `# `"
        )
    name = match["name"]
    if match["hex"]:
        red, green, blue = bytes.fromhex(match["hex"])
    elif match["red"] is None:
        return name, None
    else:
        red, green, blue = (int(match[channel]) for channel in ("red", "green", "blue"))
    if max(red, green, blue) > 255:
        raise ValueError(f"the colour {red} {green} {blue} has a number greater than 255")
    return name, (red, green, blue)


def _default_colors(names: tuple[str, ...]) -> tuple[Color, ...]:
    for known in (labels.CAMVID, labels.CITYSCAPES, labels.VOC):
        if len(known.names) == len(names) and all(map(_same_name, known.names, names)):
            return known.colors
    return labels.voc_palette(len(names))


def _same_name(known: str, name: str) -> bool:
    """Whether names are equal but for case and punctuation, or one is a prefix of the other."""
    ours, theirs = (re.sub(r"[\W_]", "", text.casefold()) for text in (known, name))
    return bool(theirs) and (ours.startswith(theirs) or theirs.startswith(ours))
