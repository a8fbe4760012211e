"""Pairs the images and masks of a user's folder, and collects what is wrong with them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from deeplab_jax.config import FolderConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.pairing import (
    MASK_SUFFIXES,
    SPELLINGS,
    SPLITS,
    File,
    Files,
    Key,
    Pairing,
    Pattern,
    normal_form,
    spell_settings,
)
from deeplab_jax.data.datasets.proposals import looks_like_mask
from deeplab_jax.data.datasets.splits import (
    find_lists,
    find_name,
    split_by_hash,
    two_spellings,
    without_suffix,
)
from deeplab_jax.data.io import lists
from deeplab_jax.data.io.images import SUFFIXES
from deeplab_jax.utils.errors import MAX_LISTED_PROBLEMS, did_you_mean

# Files beside images and masks that are not passed over by mistake.
_TEXTS = (".txt", ".csv", ".md", ".yaml", ".yml", ".html", ".json", ".xml", ".py", ".pdf", ".zip")
_PICTURES = tuple(SUFFIXES)


@dataclasses.dataclass(frozen=True)
class FolderLayout:
    """The pairs below a root.

    Attributes:
      kind: what defines the splits: "folders", "lists", "fraction", "csv" or "coco".
      splits: the pairs of each split that exists.
      problems: a sentence for each problem. Pairs with a problem are left out.
      skipped: files among images and masks that are neither, and folders of no split.
      image_pattern, mask_pattern: the paths of images and masks; empty for "csv" and "coco".
      notes: what was found without settings, or is left out.
    """

    kind: str
    splits: dict[str, list[Pair]]
    problems: list[str]
    skipped: list[pathlib.Path]
    image_pattern: str = ""
    mask_pattern: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


class _Group(NamedTuple):
    """The files of a split, as the paths spell it, by their names."""

    spelling: str
    images: dict[str, pathlib.Path]
    masks: dict[str, pathlib.Path]

    @property
    def has_pairs(self) -> bool:
        return not self.images.keys().isdisjoint(self.masks)


class PairFinder:
    """Pairs the files that two patterns match, and collects problems, skipped files and notes.

    `origin` says who chose the patterns: "settings", "names" (they are found from the names of
    files) or "standard" (the folders images and masks).
    """

    def __init__(
        self, root: pathlib.Path, config: FolderConfig, files: Files, pairing: Pairing, origin: str
    ) -> None:
        self.root, self.config, self.files, self.pairing = root, config, files, pairing
        self.origin = origin
        self.image_pattern, self.mask_pattern = pairing.image_pattern, pairing.mask_pattern
        self.problems: list[str] = []
        self.skipped: list[pathlib.Path] = []
        self.notes: list[str] = []
        self.suffixes: dict[str, collections.Counter[str]] = {}  # of images and masks, if needed

    def find(self) -> FolderLayout:
        images = self._select("image", self.image_pattern, self.pairing.images)
        masks = self._select("mask", self.mask_pattern, self.pairing.masks)
        self._find_skipped()
        groups = self._group(images, masks)
        found_lists, problems = find_lists(self.root)
        if self.image_pattern.has_split or self.mask_pattern.has_split:
            kind, splits = "folders", self._pair_splits(groups)
        elif found_lists:
            self.problems += problems
            kind, splits = "lists", self._pair_lists(found_lists, groups[""])
        else:
            self._note_splits_in_names(groups[""].images)
            pairs = self._pair_all(groups[""])
            kind, splits = "fraction", split_by_hash(pairs, self.config)
        texts = self.image_pattern.text, self.mask_pattern.text
        return FolderLayout(kind, splits, self.problems, self.skipped, *texts, self.notes)

    def _settings(self, old: str, new: str) -> str:
        """Spells the patterns as settings, in which a part is replaced."""
        texts = self.image_pattern.text, self.mask_pattern.text
        return spell_settings(*(text.replace(old, new) for text in texts))

    def _note_splits_in_names(self, names: Iterable[str]) -> None:
        """Notes that all names begin with a split, as in `train_1`, but are split by a fraction."""
        starts = {name.rpartition("/")[2].partition("_")[0].lower() for name in names}
        if len(starts) > 1 and starts <= SPELLINGS.keys():
            self.notes.append(
                f"names begin with {', '.join(sorted(starts))}, but a fraction of all is val. To "
                f"use these splits, set {self._settings('{name}', '{split}_{name}')}"
            )

    def _select(
        self, kind: str, pattern: Pattern, found: Mapping[Key, list[File]]
    ) -> dict[Key, File]:
        """Returns the file of each name; two files, or two spellings of a split, are a problem."""
        spellings: dict[str, set[str]] = {}
        chosen = {}
        for key, files in found.items():
            # A mask may be beside the polygons that it was drawn from.
            pictures = [file for file in files if file.path.lower().endswith(_PICTURES)] or files
            self.skipped += [self.files.full[file.path] for file in files if file not in pictures]
            first = chosen[key] = pictures[0]
            for file in pictures:
                spellings.setdefault(file.split, set()).add(file.spelling)
                if file is not first and (file.spelling == first.spelling or not key[0]):
                    paths = self.files.full[file.path], self.files.full[first.path]
                    self._add_same_name(kind, *paths, first.spelling)
        for split, texts in spellings.items():
            # The path up to the folder or file that names the split.
            path = "".join(re.findall(r"^.*?\{split\}[^/]*", pattern.text))
            spelled = [self.root / path.replace("{split}", each) for each in sorted(texts)]
            problem = two_spellings(split, *spelled)
            if len(texts) > 1 and problem not in self.problems:
                self.problems.append(problem)
        return chosen

    def _add_same_name(
        self, kind: str, path: pathlib.Path, other: pathlib.Path, spelling: str = ""
    ) -> None:
        """Adds the problem that two images, or two masks, have one name."""
        texts = {"image": self.image_pattern.text, "mask": self.mask_pattern.text}
        found = self.pairing.images if kind == "image" else self.pairing.masks
        self.suffixes[kind] = self.suffixes.get(kind) or collections.Counter(
            pathlib.PurePosixPath(file.path).suffix for file in itertools.chain(*found.values())
        )
        suffix = max((other.suffix, path.suffix), key=lambda each: self.suffixes[kind][each])
        texts[kind] = re.sub(r"\.\*$", suffix, texts[kind])
        if not self.pairing.by_split:
            texts[kind] = texts[kind].replace("{split}", spelling)
        is_named = self.config.mask_name != "{name}"
        reset = "--config.data.folder.mask_name='{name}' " if is_named else ""
        advice = f"Say which is meant: {reset}{spell_settings(**texts)}"
        if self.origin == "settings" and spell_settings(**texts) == self.pairing.settings:
            advice = f"Rename one, or set the {kind}_pattern so that only one of them fits"
        self.problems.append(
            f"{path} and {other} have the same name, so that an image has two files of its {kind}. "
            + advice
        )

    def _find_skipped(self) -> None:
        """Adds the images, and all files beside images and masks, that no pattern matches."""
        matched = (*self.pairing.images.values(), *self.pairing.masks.values())
        used = {file.path for files in matched for file in files}
        folders = {path.rpartition("/")[0] for path in used}
        any_suffix = Pattern(re.sub(r"\.\w+$", ".*", self.mask_pattern.text))
        for path, full in self.files.full.items():
            suffix = full.suffix.lower()
            is_stray = path.rpartition("/")[0] in folders and (
                self.origin == "standard" or suffix not in _TEXTS
            )
            if path in used or not (suffix in SUFFIXES or is_stray):
                continue
            other = any_suffix.match(path) if self.origin == "names" else None
            key = other and (other.split if self.pairing.by_split else "", other.name)
            if key in self.pairing.masks:
                self._add_same_name("mask", self.files.full[self.pairing.masks[key][0].path], full)
            else:
                self.skipped.append(full)

    def _group(self, images: Mapping[Key, File], masks: Mapping[Key, File]) -> dict[str, _Group]:
        """Groups the files by split; one of the patterns may have no split."""
        with_split = {
            key: file for found in (masks, images) for key, file in found.items() if file.split
        }
        groups = {"": _Group("", {}, {})}
        for kind, found in (("images", images), ("masks", masks)):
            for key, file in found.items():
                known = with_split.get(key, file)
                group = groups.setdefault(known.split, _Group(known.spelling, {}, {}))
                getattr(group, kind)[key[1]] = self.files.full[file.path]
        for group in groups.values():
            group.masks.update(self._find_links(group))
        return groups

    def _find_links(self, group: _Group) -> dict[str, pathlib.Path]:
        """Finds masks that are known by another path, because `find_files` uses only one."""
        missing = [name for name in group.images if name not in group.masks]
        if not missing:
            return {}
        real = functools.cache(os.path.realpath)
        known = {
            (real(path.parent), text): path
            for path in group.masks.values()
            for text in (path.name, path.stem)
        }
        paths = {
            name: self.root / self.mask_pattern.fill(name, group.spelling).removesuffix(".*")
            for name in missing
        }
        keys = {name: (real(path.parent), path.name) for name, path in paths.items()}
        return {name: known[key] for name, key in keys.items() if key in known}

    def _pair_splits(self, groups: Mapping[str, _Group]) -> dict[str, list[Pair]]:
        splits = {}
        for split, group in groups.items():
            if split == "test" and group.images and not group.has_pairs:
                self.notes.append(f"{group.spelling}: no image has a mask, so it is left out")
            elif split in ("", "test") or group.has_pairs:
                splits[split] = self._pair_all(group)
            else:
                other = groups.get("val" if split == "train" else "train")
                self._add_split_without_pairs(group, other)
        splits = {split: splits[split] for split in SPLITS if splits.get(split)}
        is_train = splits.keys() - {"test"} == {"train"} and "val" not in groups
        if is_train and self.origin != "standard":
            share = split_by_hash(splits["train"], self.config)
            self.notes.append(
                f"there is no split val: {len(share['val'])} of the {len(splits['train'])} "
                "images of train are val (config.data.folder.val_fraction)"
            )
            splits |= share
        return splits

    def _add_split_without_pairs(self, group: _Group, other: _Group | None) -> None:
        what, use = "has no images", ""
        if group.images:
            path = self.root / self.mask_pattern.fill(next(iter(group.images)), group.spelling)
            what = f"none of its {len(group.images)} images has a mask, such as {path}"
        if other and other.has_pairs:
            settings = self._settings("{split}", other.spelling)
            use = f". To use the other split only, set {settings}"
        self.problems.append(f"{self.root}: split {group.spelling}: {what}{use}")

    def _pair_all(self, group: _Group) -> list[Pair]:
        """Pairs all images with all masks of a split by their names."""
        names = {name: name for name in group.images}
        pairs = self._pair(group, names, self.root)
        if pairs or not names:  # otherwise the pattern is wrong, which is a problem already
            used = {pair.mask for pair in pairs}
            suffixes = SUFFIXES.union(path.suffix.lower() for path in used)
            missing = sorted(group.images.keys() - group.masks.keys())
            for name, path in group.masks.items():
                if path not in used and path.suffix.lower() not in suffixes:
                    self.skipped.append(path)  # as a JSON file beside PNGs
                elif path not in used:
                    hint = nearest_name(name, missing, self.problems)
                    self.problems.append(f"{path}: is the mask of no image{hint}")
        return pairs

    def _pair(
        self, group: _Group, mask_names: Mapping[str, str], listed_in: pathlib.Path
    ) -> list[Pair]:
        """Pairs images with the masks of the given names. An image without a mask is a problem.

        But labelme writes no file for an image without shapes; such images are left out.
        """
        images, masks = group.images, group.masks
        pairs = [
            Pair(name, images[name], masks[mask], listed_in)
            for name, mask in mask_names.items()
            if mask in masks
        ]
        absent = [name for name, mask in mask_names.items() if mask not in masks]
        if absent and self.mask_pattern.text.endswith(".json"):
            self.notes.append(
                f"{len(absent)} images have no LabelMe file and are left out, as "
                f"{images[absent[0]]}"
            )
            return pairs
        unused = masks.keys() - mask_names.values()
        for name in absent:
            path = self.root / self.mask_pattern.fill(name, group.spelling)
            advice = "Add it, or leave the image out"
            if looks_like_mask(images[name].name):
                settings = "config.data.folder.image_pattern and mask_pattern"
                advice = f"If it is a mask itself, set {settings}"
            hint = nearest_name(mask_names[name], unused, self.problems)
            self.problems.append(f"{images[name]}: has no mask {path}{hint}. {advice}")
        return pairs

    def _pair_lists(
        self, found: Mapping[str, pathlib.Path], group: _Group
    ) -> dict[str, list[Pair]]:
        """Pairs the images that the list of each split names."""
        known = {*group.images.values(), *group.masks.values()}
        others = {  # lists may name masks that the pattern does not match
            below: path
            for below, path in self.files.full.items()
            if path not in known and path.suffix.lower() in MASK_SUFFIXES
        }
        image_names = self._spellings(group.images)
        mask_names = self._spellings(others) | self._spellings(group.masks)
        group.masks.update(others)
        splits: dict[str, list[Pair]] = {}
        listed: dict[str, pathlib.Path] = {}
        for split in filter(found.get, SPLITS):
            path = found[split]
            lines = lists.read_lines(path)
            if not lines:
                self.problems.append(f"{path}: names no image, expected one name per line")
            names: dict[str, str] = {}  # the mask of each image
            for line in lines:
                for name, mask in self._parse_line(line, image_names, mask_names, path).items():
                    if names.setdefault(name, mask) != mask:
                        self.problems.append(f"{path}: names two masks of {name}")
            shared = [name for name in names if name in listed]
            if shared:
                self.problems.append(
                    f"{path} and {listed[shared[0]]} share {len(shared)} images, as {shared[0]}: "
                    "training images cannot be used to evaluate. Remove them from one of the lists."
                )
            listed |= dict.fromkeys(names, path)
            if split == "test" and names and group.masks.keys().isdisjoint(names.values()):
                self.notes.append(f"{path}: no image has a mask, so test is left out")
            else:
                splits[split] = self._pair(group, names, path)
        used = {pair.mask for pair in itertools.chain(*splits.values())}
        self.skipped = [path for path in self.skipped if path not in used]
        return splits

    def _spellings(self, files: Mapping[str, pathlib.Path]) -> dict[str, str]:
        """Returns the names of files by what lists may call them: a path, or a unique last part."""
        paths = {
            name: pathlib.PurePosixPath(normal_form(str(path.relative_to(self.root)))).with_suffix(
                ""
            )
            for name, path in files.items()
        }
        counts = collections.Counter(path.name for path in paths.values())
        last_parts = {path.name: name for name, path in paths.items() if counts[path.name] == 1}
        whole = {str(path): name for name, path in paths.items()}
        return last_parts | whole | {name: name for name in files}

    def _parse_line(
        self, line: str, images: Mapping[str, str], masks: Mapping[str, str], path: pathlib.Path
    ) -> dict[str, str]:
        """Returns the image that a line of a list names, and its mask; or adds a problem."""
        image_folder, mask_folder = (
            pathlib.PurePosixPath(pattern.text).parent
            for pattern in (self.image_pattern, self.mask_pattern)
        )
        ways = lists.split_line(line)
        for fields in ways:
            image = find_name(fields[0], images, image_folder.name)
            mask = find_name(fields[-1], masks, mask_folder.name)
            if image and len(fields) == 1:
                return {image: image}
            if image and mask and len(fields) == 2:
                return {image: mask}
        known = (find_name(way[0], images, image_folder.name) for way in ways)
        image = next(filter(None, known), None)
        if image:
            problem = f"has the line {line!r}; expected the name of an image, as in {image}, or "
            problem += f"also that of its mask in {self.root / mask_folder}, after a space, comma "
            problem += "or tab"
        else:
            name = without_suffix(line)
            problem = f"names {name}, but there is no {self.root / self.image_pattern.fill(name)}"
            problem += nearest_name(name, images, self.problems)
        self.problems.append(f"{path}: {problem}")
        return {}


def nearest_name(name: str, known: Iterable[str], problems: Sequence[str]) -> str:
    """Names the nearest known name, unless there are more problems than are listed."""
    if name != name.encode(errors="ignore").decode():
        return ". That name is not UTF-8: if it is listed in a file, save the file as UTF-8"
    if len(problems) >= MAX_LISTED_PROBLEMS:
        return ""
    known = list(known)
    if name not in known and normal_form(name) in map(normal_form, known):
        return ". That name exists in another form of Unicode (NFC or NFD): rename one"
    return did_you_mean(name, known)
