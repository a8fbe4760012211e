"""Files of classes: names, and the values and colours that stand for them in a user's masks."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable

from deeplab_jax.data import labels
from deeplab_jax.data.io import class_formats
from deeplab_jax.data.io.class_formats import Entry, from_rgb, to_rgb
from deeplab_jax.data.io.lists import read_text
from deeplab_jax.data.labels import IGNORE, LabelSet
from deeplab_jax.utils.errors import raise_problems

EXAMPLE = "background\ntraffic light\ncrack 3-4 255"
# Names of files that are looked for if no setting names one; the first that exists counts.
FILE_NAMES = (
    *("classes.txt", "labelmap.txt", "labels.txt", "label_colors.txt", "class_dict.csv"),
    *("_classes.csv", "classes.csv", "labels.csv", "obj.names", "class_names.txt"),
    *("classes.json", "categories.json", "objectinfo150.txt", "labels.py"),
)

Meaning = tuple[int, int, int]  # first and last of values in masks, and the id that they mean


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """What a file of classes says.

    Attributes:
      path: the file.
      kind: what the file is if another tool wrote it, such as "CVAT's labelmap"; else empty.
      labels: names of the classes, and their colours in pictures.
      values: the ids of whole numbers in masks; many may have one id, and `labels.IGNORE` is that
        of pixels that do not count.
      states_values: whether the file states values, if only ignored ones; else they are 0, 1, ...
        in its order.
      colors: the ids of colours, as red * 65536 + green * 256 + blue; those of CamVid's,
        Cityscapes' and VOC's classes if the file has none, else empty.
      train_values: as `values`, of masks that hold training ids (Cityscapes).
    """

    path: pathlib.Path
    kind: str
    labels: LabelSet
    values: tuple[Meaning, ...]
    states_values: bool
    colors: tuple[Meaning, ...] = ()
    train_values: tuple[Meaning, ...] = ()

    def names_of(self, meanings: Iterable[Meaning]) -> dict[int, str]:
        """Returns the name of the class of each value or colour; of ignored ones "ignore"."""
        names = dict(enumerate(self.labels.names)) | {IGNORE: "ignore"}
        return {
            value: names[index] for low, high, index in meanings for value in range(low, high + 1)
        }


def find(root: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of classes in a root, else those in its subfolders, the first to be used.

    Capitals in names do not matter in the root.
    """
    with os.scandir(root) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
        files = [root / entry.name for entry in entries if entry.name.lower() in FILE_NAMES]
        folders = [
            root / entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."
        ]
    found = files or [folder / name for folder in folders for name in FILE_NAMES]
    found = [path for path in found if path.is_file()]
    return sorted(found, key=lambda path: (FILE_NAMES.index(path.name.lower()), path))


def read(path: pathlib.Path) -> ClassTable:
    """Reads a file of classes, one per line in the order of their ids, or of another tool.

    A line is a name, which may contain spaces, and the values or colours that its pixels have in
    masks: `car`, `car 7`, `car 0-127 255`, `car 64 0 128` or `car #400080`, and several of them.
    Without values they have the number of the line, from 0. Three numbers on every line are
    colours. `class 7 = 7` states where values begin. `ignore 255` names values that do not count.
    Blank lines and comments (from a `#` and a space to the end of the line) are skipped.

    Classes without colours get those of the data set with the same class names (CamVid, Cityscapes
    or VOC), else those of VOC's colour map.

    Raises:
      UserError: the file cannot be read, or has wrong lines, all of which are listed.
    """
    text = read_text(path)
    try:
        kind, entries = class_formats.parse(text)
    except ValueError as error:
        raise_problems(f"{path}", [str(problem) for problem in error.args])
        raise
    named = [entry for entry in entries if not entry.is_ignored]
    first = {entry.name: entry for entry in reversed(named)}
    problems = [
        f"line {entry.line}: the class {entry.name!r} is already named"
        for entry in named
        if first[entry.name] is not entry
    ]
    if not 1 <= len(named) <= IGNORE:
        problems.append(
            f"names {len(named)} classes, expected 1 to {IGNORE}, one per line, as in\n{EXAMPLE}"
        )
    plain = [entry.name for entry in named if not entry.colors]
    if plain and len(plain) < len(named):
        problems.append(
            f"{', '.join(plain[:3])} has no colour, but others have. Give all classes a colour, as "
            "in `car 64 0 128`, or none"
        )
    ids = [*enumerate(named), *((IGNORE, entry) for entry in entries if entry.is_ignored)]
    claims = [
        (*values, index, entry)
        for index, entry in ids
        for values in entry.values or [(index, index)] * (index < IGNORE)
    ]
    raise_problems(f"{path}", problems + _claimed_twice(claims))
    names = tuple(entry.name for entry in named)
    known = _known_colors(names)
    if plain:
        colors = [(color, color, index) for index, color in enumerate(map(from_rgb, known))]
    else:
        colors = [(color, color, index) for index, entry in ids for color in entry.colors]
        known = tuple(to_rgb(entry.colors[0]) for entry in named)
    return ClassTable(
        path=path,
        kind=kind,
        labels=LabelSet(names, known or labels.voc_palette(len(names))),
        values=tuple(claim[:3] for claim in claims),
        states_values=any(entry.values for entry in entries),
        colors=tuple(colors),
        train_values=tuple((*v, index) for index, entry in ids for v in entry.train_values),
    )


def _claimed_twice(claims: Iterable[tuple[int, int, int, Entry]]) -> list[str]:
    """Describes values that two classes claim; a class without values claims its number."""
    problems = []
    for (_, high, _, one), (low, _, _, two) in itertools.pairwise(
        sorted(claims, key=lambda claim: claim[:2])
    ):
        if low <= high and one is not two:
            lines = " and ".join(
                f"{entry.name} (line {entry.line}"
                + (")" if entry.values else ", whose number from 0 it is)")
                for entry in sorted((one, two), key=lambda entry: entry.line)
            )
            problems.append(
                f"the value {low} is claimed by {lines}. Give it to one of them; if it is a part "
                "of a name, write values after `=`, as in `class 7 = 7`"
            )
    return problems


def _known_colors(names: tuple[str, ...]) -> tuple[tuple[int, int, int], ...]:
    """Returns the colours of the data set that has these classes; empty: none that is known."""
    for known in labels.KNOWN:
        if len(known.names) == len(names) and all(map(_same_name, known.names, names)):
            return known.colors
    return ()


def _same_name(known: str, name: str) -> bool:
    """Whether names are equal but for case and punctuation, or one is a prefix of the other."""
    ours, theirs = (re.sub(r"[\W_]", "", text.casefold()) for text in (known, name))
    return bool(theirs) and (ours.startswith(theirs) or theirs.startswith(ours))
