"""Patterns of paths that pair images with masks."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import shlex
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from deeplab_jax.data.io.images import SUFFIXES

SPLITS = ("train", "val", "test")
# Names that others give to splits, lower case.
SPELLINGS = {"training": "train", "trn": "train", "testing": "test"} | {
    **dict.fromkeys(("valid", "validation", "eval"), "val"),
    **{split: split for split in SPLITS},
}
MASK_SUFFIXES = SUFFIXES | {".npz", ".mat", ".json"}

SPELLED = "|".join(sorted(SPELLINGS, key=len, reverse=True))
PLACEHOLDER = re.compile(r"(\{(?:split|folder|name|number)\})")
_GROUPS = {
    "{split}": rf"(?P<split>{SPELLED})",
    "{folder}": r"(?P<folder>.+)",
    "{name}": r"(?P<name>[^/]+)",
    "{number}": r"0*(?P<name>\d+)",
}


class File(NamedTuple):
    """A file that a pattern matches.

    Attributes:
      path: below the root, with slashes.
      name: what `{folder}` and `{name}` match, with the subfolders before `{name}`.
      split: train, val or test; empty if the pattern has no `{split}`.
      spelling: the split as the path has it.
    """

    path: str
    name: str
    split: str
    spelling: str


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Paths below a root, such as `{split}/{name}_mask.png`; docs/own_data.md describes them.

    Attributes:
      text: the pattern.
      suffixes: what `.*` matches at the end, lower case.
    """

    text: str
    suffixes: frozenset[str] = SUFFIXES

    @property
    def has_split(self) -> bool:
        return "{split}" in self.text

    @functools.cached_property
    def num_literals(self) -> int:
        return len(PLACEHOLDER.sub("", self.text.removesuffix(".*")))

    @functools.cached_property
    def _regex(self) -> re.Pattern[str]:
        text = self.text.replace("\\", "/").removeprefix("./")
        seen: set[str] = set()
        components = []
        for component in text.removesuffix(".*").split("/"):
            regex = ""
            for part in PLACEHOLDER.split(component):
                group = _GROUPS.get(part, re.escape(part))
                regex += f"(?P={part[1:-1]})" if part in seen else group
                seen |= {part} & {"{split}", "{name}"}
            is_first = "(?P<name>" in regex
            components.append(f"(?P<parents>(?:.+/)?){regex}" if is_first else regex)
        suffix = f"(?:{'|'.join(map(re.escape, self.suffixes))})" if text.endswith(".*") else ""
        return re.compile("/".join(components) + suffix, re.IGNORECASE)

    def match(self, path: str) -> File | None:
        found = self._regex.fullmatch(path)
        if not found:
            return None
        groups = {"folder": "", "split": ""} | found.groupdict(default="")
        folder = f"{groups['folder']}/" if groups["folder"] else ""
        name = normal_form(folder + groups["parents"] + groups["name"])
        return File(path, name, SPELLINGS.get(groups["split"].lower(), ""), groups["split"])

    def fill(self, name: str, split: str = "") -> str:
        """Returns the path of a name and a spelling of a split."""
        folder, _, stem = name.rpartition("/")
        text = self.text.replace("{split}", split or "{split}")
        if "{folder}" in text:
            text = text.replace("{folder}", folder)
        elif folder:
            first = r"[^/]*\{(?:name|number)\}"
            text = re.sub(first, lambda found: f"{folder}/{found[0]}", text, count=1)
        return text.replace("{name}", stem).replace("{number}", stem)


Key = tuple[str, str]  # split (empty if only one of the patterns has it) and name


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The files that a pattern of images and a pattern of masks match."""

    image_pattern: Pattern
    mask_pattern: Pattern
    images: dict[Key, list[File]]
    masks: dict[Key, list[File]]

    @property
    def by_split(self) -> bool:
        """Whether the split is part of the keys."""
        return self.image_pattern.has_split and self.mask_pattern.has_split

    @property
    def settings(self) -> str:
        """The settings, as they can be pasted."""
        return spell_settings(self.image_pattern.text, self.mask_pattern.text)


def normal_form(text: str) -> str:
    """Returns a name in NFC, because archives that were made on macOS have it in NFD."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def spell_settings(image: str, mask: str) -> str:
    """Returns two patterns as options of training."""
    return (
        f"--config.data.folder.image_pattern={shlex.quote(image)} "
        f"--config.data.folder.mask_pattern={shlex.quote(mask)}"
    )


class Files:
    """Paths below a root, and what patterns match among them.

    Attributes:
      full: the path of each file, by the path below the root.
      paths: the paths below the root.
    """

    def __init__(self, root: pathlib.Path, files: Iterable[pathlib.Path]) -> None:
        start = len(root.parts)
        self.full = {"/".join(path.parts[start:]): path for path in files}
        self.paths = list(self.full)
        self._matches: dict[Pattern, dict[str, File]] = {}

    def match(self, pattern: Pattern) -> dict[str, File]:
        if pattern not in self._matches:
            found = map(pattern.match, self.paths)
            self._matches[pattern] = {file.path: file for file in found if file}
        return self._matches[pattern]

    def pair(self, image_text: str, mask_text: str) -> Pairing:
        """Matches two patterns. A file that both match belongs to the one with more letters."""
        image_pattern = Pattern(image_text)
        mask_pattern = Pattern(mask_text, frozenset(MASK_SUFFIXES))
        images, masks = self.match(image_pattern), self.match(mask_pattern)
        if image_pattern.num_literals > mask_pattern.num_literals:
            masks = {path: file for path, file in masks.items() if path not in images}
        else:
            images = {path: file for path, file in images.items() if path not in masks}
        pairing = Pairing(image_pattern, mask_pattern, {}, {})
        by_split = pairing.by_split
        for found, files in ((pairing.images, images), (pairing.masks, masks)):
            for file in files.values():
                found.setdefault((file.split if by_split else "", file.name), []).append(file)
        return pairing
