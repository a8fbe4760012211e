"""Finds the pairs of an image and a mask in a user's folder or CSV file, and their splits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from deeplab_jax.config import DataConfig, FolderConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.io import lists
from deeplab_jax.data.io.images import SUFFIXES
from deeplab_jax.utils.errors import MAX_LISTED_PROBLEMS, UserError, did_you_mean
from deeplab_jax.utils.files import find_files, is_hidden
from deeplab_jax.utils.paths import expand_home

SPLITS = ("train", "val", "test")

# Names that others give to splits, lower case.
_SPELLINGS = {split: split for split in SPLITS} | {
    **dict.fromkeys(("training", "trn"), "train"),
    **dict.fromkeys(("valid", "validation", "eval"), "val"),
    **dict.fromkeys(("testing",), "test"),
}

LAYOUTS = """\
- images/train, images/val and masks/train, masks/val
- images and masks, with train.txt and val.txt, which list one name per line
- images and masks only: config.data.folder.val_fraction of them is val
- instead of a folder, a CSV file with the columns image, mask and split"""


@dataclasses.dataclass(frozen=True)
class FolderLayout:
    """The pairs below a root.

    Attributes:
      kind: what defines the splits: "folders", "lists", "fraction" or "csv".
      splits: the pairs of each split that exists.
      problems: a sentence for each problem. Pairs with a problem are left out.
      skipped: what is in the folders of images and masks, but is no image or of no split.
    """

    kind: str
    splits: dict[str, list[Pair]]
    problems: list[str]
    skipped: list[pathlib.Path]


def detect_layout(config: DataConfig) -> FolderLayout:
    """Detects the layout of `config.root` by the names of its files. Opens no image.

    Raises:
      UserError: the root has none of the layouts.
    """
    if not config.root:
        raise UserError(
            "config.data.root is empty: set it to the folder of your images and masks. It holds "
            f"one of\n{LAYOUTS}"
        )
    root = expand_home(config.root)
    finder = _PairFinder(root, config.folder)
    if root.is_file():
        kind, splits = "csv", finder.from_csv()
    elif not root.is_dir():
        raise UserError(f"config.data.root: there is no folder {root}")
    else:
        _require_folders(root)
        if any((root / "images" / split).is_dir() for split in SPLITS):
            kind, splits = "folders", finder.from_folders()
        elif any((root / f"{split}.txt").is_file() for split in SPLITS):
            kind, splits = "lists", finder.from_lists()
        else:
            kind, splits = "fraction", finder.from_fraction()
        finder.check_names_of_splits()
    return FolderLayout(kind, splits, finder.problems, finder.skipped)


def _require_folders(root: pathlib.Path) -> None:
    missing = [name for name in ("images", "masks") if not (root / name).is_dir()]
    if not missing:
        return
    names = sorted(path.name for path in root.iterdir() if not is_hidden(path.name))
    found = f"It holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}." if names else ""
    tables = [name for name in names if name.lower().endswith(".csv")]
    if tables:
        found += f" To use the table in it, set config.data.root={root / tables[0]}."
    raise UserError(
        f"config.data.root: {root} has no folder {' and no folder '.join(missing)}. {found}\n"
        f"Expected one of\n{LAYOUTS}"
    )


class _PairFinder:
    """Finds pairs below a root, and collects problems. Each `from_` method returns the splits."""

    def __init__(self, root: pathlib.Path, config: FolderConfig) -> None:
        self.root = root
        self.images, self.masks = root / "images", root / "masks"
        self.config = config
        self.problems: list[str] = []
        self.skipped: list[pathlib.Path] = []

    def check_names_of_splits(self) -> None:
        """Adds a problem for each list or folder that is not used because of its spelling."""
        for folder, suffix in ((self.root, ".txt"), (self.images, "")):
            for path in sorted(folder.iterdir()):
                split = _SPELLINGS.get(path.stem.lower())
                if not split or path.suffix.lower() != suffix or path.is_dir() == bool(suffix):
                    continue
                if not (folder / f"{split}{suffix}").exists():
                    self.problems.append(f"{path}: is not used. Rename it {split}{suffix}")

    def from_folders(self) -> dict[str, list[Pair]]:
        self.skipped += [
            path
            for path in sorted(self.images.iterdir())
            if path.name not in SPLITS and not is_hidden(path.name)
        ]
        splits = {}
        for split in SPLITS:
            images, masks = self.images / split, self.masks / split
            if images.is_dir() and masks.is_dir():
                splits[split] = self._pair_folders(images, masks)
            elif images.is_dir() or masks.is_dir():
                found, missing = (images, masks) if images.is_dir() else (masks, images)
                self.problems.append(f"{found}: has no counterpart {missing}")
        return splits

    def from_lists(self) -> dict[str, list[Pair]]:
        images, masks = self._find_files(self.images), self._find_files(self.masks)
        splits: dict[str, list[Pair]] = {}
        listed: dict[str, pathlib.Path] = {}
        for split in SPLITS:
            path = self.root / f"{split}.txt"
            if not path.is_file():
                continue
            lines = lists.read_lines(path)
            if not lines:
                self.problems.append(f"{path}: names no image, expected one name per line")
            names: dict[str, str] = {}  # the mask of each image
            for line in lines:
                for name, mask in self._parse_line(line, images, masks, path).items():
                    if names.setdefault(name, mask) != mask:
                        self.problems.append(f"{path}: names two masks of {name}")
            shared = [name for name in names if name in listed]
            if shared:
                self.problems.append(
                    f"{path} and {listed[shared[0]]} share {len(shared)} images, as {shared[0]}: "
                    "training images cannot be used to evaluate. Remove them from one of the lists."
                )
            listed |= dict.fromkeys(names, path)
            known = {name: images[name] for name in names}
            splits[split] = self._pair(known, masks, path, self.masks, names)
        return splits

    def _parse_line(
        self,
        line: str,
        images: Mapping[str, pathlib.Path],
        masks: Mapping[str, pathlib.Path],
        path: pathlib.Path,
    ) -> dict[str, str]:
        """Returns the image that a line of a list names, and its mask; or adds a problem."""
        ways = lists.split_line(line)
        for fields in ways:
            image = _find_name(fields[0], images, "images")
            mask = _find_name(fields[-1], masks, "masks")
            if image and len(fields) == 1:
                return {image: _mask_of(image, self.config.mask_name)}
            if image and mask and len(fields) == 2:
                return {image: mask}
        image = next(filter(None, (_find_name(way[0], images, "images") for way in ways)), None)
        if image:
            problem = f"has the line {line!r}; expected the name of an image, as in {image}, or "
            problem += f"also that of its mask in {self.masks}, after a space, comma or tab"
        else:
            name = _without_suffix(line)
            problem = f"names {name}, but there is no {self.images / name}.*"
            problem += self._hint(name, images)
        self.problems.append(f"{path}: {problem}")
        return {}

    def from_fraction(self) -> dict[str, list[Pair]]:
        splits: dict[str, list[Pair]] = {"train": [], "val": []}
        for pair in self._pair_folders(self.images, self.masks):
            splits[_hash_to_split(pair.name, self.config)].append(pair)
        return splits

    def from_csv(self) -> dict[str, list[Pair]]:
        """Paths in the table are relative to the folder of the CSV file, which is the root."""
        path, folder = self.root, self.root.parent
        rows = lists.read_table(path)
        has_splits = any(row["split"] for row in rows.values())
        splits: dict[str, list[Pair]] = {} if has_splits else {"train": [], "val": []}
        lines: dict[str, int] = {}
        for line, row in rows.items():
            image, mask = (_existing_path(folder, row[column]) for column in ("image", "mask"))
            name = pathlib.PurePath(image).with_suffix("").as_posix() if image else ""
            split = row["split"] if has_splits else _hash_to_split(name, self.config)
            missing = [file for file in (image, mask) if not os.path.isfile(folder / file)]
            if not image or not mask:
                problem = f"line {line} names no {'mask' if image else 'image'}"
            elif split not in SPLITS:
                problem = f"line {line} has split {split!r}, expected {', '.join(SPLITS)}"
            elif name in lines:
                problem = f"lines {lines[name]} and {line} name one image, {image}"
            elif missing:
                expected = folder / missing[0]
                siblings = os.listdir(expected.parent) if expected.parent.is_dir() else ()
                hint = self._hint(expected.name, siblings)
                problem = f"line {line} names {missing[0]}, which does not exist{hint}"
                if os.path.isdir(expected):
                    problem = f"line {line} names {missing[0]}, which is a folder"
            else:
                problem = ""
                splits.setdefault(split, []).append(Pair(name, folder / image, folder / mask, path))
            if problem:
                self.problems.append(f"{path}: {problem}")
            lines.setdefault(name, line)
        return splits

    def _pair_folders(self, images_folder: pathlib.Path, masks_folder: pathlib.Path) -> list[Pair]:
        """Pairs all images with all masks."""
        images, masks = self._find_files(images_folder), self._find_files(masks_folder)
        if not images:
            self.problems.append(
                f"{images_folder}: holds no images ({', '.join(sorted(SUFFIXES))})"
            )
            return []
        pairs = self._pair(images, masks, images_folder, masks_folder)
        if pairs:  # otherwise `mask_name` is wrong, which is a problem already
            expected = {_mask_of(name, self.config.mask_name) for name in images}
            used = {pair.mask for pair in pairs}
            for name in masks:
                if name not in expected and masks[name] not in used:
                    hint = self._hint(name, expected)
                    self.problems.append(f"{masks[name]}: is the mask of no image{hint}")
        return pairs

    def _pair(
        self,
        images: Mapping[str, pathlib.Path],
        masks: Mapping[str, pathlib.Path],
        listed_in: pathlib.Path,
        masks_folder: pathlib.Path,
        expected: Mapping[str, str] | None = None,
    ) -> list[Pair]:
        """Pairs images with their masks. An image without a mask is a problem.

        Args:
          images, masks: the files by name.
          listed_in: what names the images.
          masks_folder: folder of the masks.
          expected: the mask of each image. Default: the one that `mask_name` says.
        """
        if expected is None:
            expected = {name: _mask_of(name, self.config.mask_name) for name in images}
        missing = [mask for mask in expected.values() if mask not in masks]
        masks = {**masks, **_find_through_links(missing, masks.values(), masks_folder)}
        pairs = [
            Pair(name, images[name], masks[mask], listed_in)
            for name, mask in expected.items()
            if mask in masks
        ]
        pattern = "" if pairs else _guess_pattern(list(images), masks)
        if pattern:
            self.problems.append(
                f"{masks_folder}: masks are named like {next(iter(masks))}. Set "
                f"config.data.folder.mask_name={pattern}"
            )
            return []
        for name, mask in expected.items():
            if mask not in masks:
                hint = self._hint(mask, masks)
                self.problems.append(
                    f"{images[name]}: has no mask {masks_folder / mask}.*{hint}. Add it, or move "
                    "the image away"
                )
        return pairs

    def _find_files(self, folder: pathlib.Path) -> dict[str, pathlib.Path]:
        """Finds images at any depth; keys are the paths from the folder without the suffix."""
        found: dict[str, pathlib.Path] = {}
        for path in find_files(folder):
            if path.suffix.lower() not in SUFFIXES:
                self.skipped.append(path)
                continue
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                self.problems.append(
                    f"{path} and {found[name]} have the same name: keep one of them"
                )
            found.setdefault(name, path)
        return found

    def _hint(self, name: str, known: Iterable[str]) -> str:
        """Names the nearest known name, unless there are more problems than are listed."""
        if name != name.encode(errors="ignore").decode():
            return ". That name is not UTF-8: if it is listed in a file, save the file as UTF-8"
        if len(self.problems) >= MAX_LISTED_PROBLEMS:
            return ""
        known, normal = list(known), unicodedata.normalize("NFC", name)
        if name not in known and normal in (unicodedata.normalize("NFC", each) for each in known):
            return ". That name exists in another form of Unicode (NFC or NFD): rename one"
        return did_you_mean(name, known)


def _hash_to_split(name: str, config: FolderConfig) -> str:
    """Assigns the fraction `val_fraction` of names to val, by a hash of the name and the seed.

    More images do not change the split of an image.
    """
    text = f"{config.seed}/{name}".encode(errors="surrogateescape")  # names need not be UTF-8
    digest = hashlib.sha256(text).digest()
    return "val" if int.from_bytes(digest[:8], "big") < config.val_fraction * 2**64 else "train"


def _mask_of(name: str, pattern: str) -> str:
    """Returns the name of the mask of an image; both are paths from their folders."""
    path = pathlib.PurePosixPath(name)
    return (path.parent / pattern.replace("{name}", path.name)).as_posix()


def _guess_pattern(names: list[str], masks: Mapping[str, pathlib.Path]) -> str:
    """Returns a `mask_name` with which all images have a mask; empty if there is none."""
    if not names:
        return ""
    first = names[0].rpartition("/")[2]
    candidates = {mask.rpartition("/")[2] for mask in masks if first in mask}
    for mask in sorted(candidates, key=len):
        pattern = mask.replace(first, "{name}", 1)
        if all(_mask_of(name, pattern) in masks for name in names):
            return pattern
    return ""


def _find_name(text: str, known: Mapping[str, pathlib.Path], folder: str) -> str | None:
    """Returns the known name that a list's text means: with a suffix or backslashes, or as a path.

    Args:
      text: a name, or a path from the folder, from the root, or from elsewhere.
      known: files by name, see `_PairFinder._find_files`.
      folder: last folder of a path that comes before the name.
    """
    for path in dict.fromkeys((text, text.replace("\\", "/"))):
        parts = pathlib.PurePosixPath(path).parts
        starts = [0, *(index + 1 for index, part in enumerate(parts) if part == folder)]
        for name in ("/".join(parts[start:]) for start in starts):
            for each in (_without_suffix(name), name):
                if each in known:
                    return each
    return None


def _find_through_links(
    names: Sequence[str], files: Iterable[pathlib.Path], folder: pathlib.Path
) -> dict[str, pathlib.Path]:
    """Finds those names whose file is known by another path, because `find_files` uses only one."""
    if not names:
        return {}
    real = functools.cache(os.path.realpath)
    by_real_path = {(real(file.parent), file.stem): file for file in files}
    paths = {name: folder / name for name in names}
    keys = {name: (real(path.parent), path.name) for name, path in paths.items()}
    return {name: by_real_path[key] for name, key in keys.items() if key in by_real_path}


def _without_suffix(name: str) -> str:
    suffix = pathlib.PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in SUFFIXES else name


def _existing_path(folder: pathlib.Path, path: str) -> str:
    """Replaces the backslashes of a path in a table by slashes, unless there is such a file."""
    return path if os.path.isfile(folder / path) else path.replace("\\", "/")
