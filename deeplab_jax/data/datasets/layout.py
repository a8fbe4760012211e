"""Which files of a user's folder, or rows of a CSV, are a pair of an image and its mask."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping

from deeplab_jax.config import DataConfig
from deeplab_jax.data.io.reading import MAX_PROBLEMS_TOLD, Pair
from deeplab_jax.utils.errors import UserError, nearest

SPLITS = ("train", "val", "test")

# Those that Pillow or OpenCV read, and NumPy's arrays.
SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("jpg", "jpeg", "jpe", "png", "bmp", "tif", "tiff", "webp", "gif", "tga", "jp2", "avif"),
        *("ppm", "pgm", "pbm", "pnm", "npy"),
    )
)

LAYOUTS = """\
- images/train, images/val beside masks/train, masks/val
- images beside masks, and train.txt, val.txt with a name a line
- images beside masks alone: config.data.folder.val_fraction of them is val
- in place of a folder, a CSV file with the columns image, mask and split"""

Files = dict[str, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The pairs of a root.

    Attributes:
      kind: how splits are told apart: "folders", "lists", "fraction" or "csv".
      splits: the pairs of each split that there is.
      problems: what is wrong, a sentence each; pairs with a problem are left out.
      skipped: files among the images and masks whose suffix is no image's.
    """

    kind: str
    splits: dict[str, list[Pair]]
    problems: list[str]
    skipped: list[pathlib.Path]


def find(config: DataConfig) -> Layout:
    """Looks at names alone: no image is opened.

    Raises:
      UserError: the root is none of the layouts.
    """
    if not config.root:
        raise UserError(
            "config.data.root is empty: give the folder of your images and masks. It holds one of\n"
            + LAYOUTS
        )
    root = pathlib.Path(config.root).expanduser()
    if root.is_file():
        return _from_csv(root, config.folder.val_fraction, config.folder.seed)
    if not root.is_dir():
        raise UserError(f"config.data.root: there is no folder {root}")
    _require_folders(root)
    finder = _Finder(root, config.folder.mask_name)
    if any((finder.images / split).is_dir() for split in SPLITS):
        return finder.from_folders()
    if any((root / f"{split}.txt").is_file() for split in SPLITS):
        return finder.from_lists()
    return finder.from_fraction(config.folder.val_fraction, config.folder.seed)


def _require_folders(root: pathlib.Path) -> None:
    missing = [name for name in ("images", "masks") if not (root / name).is_dir()]
    if not missing:
        return
    here = sorted(path.name for path in root.iterdir())
    held = f"It holds {', '.join(here[:8])}{', ...' if len(here) > 8 else ''}." if here else ""
    tables = [name for name in here if name.lower().endswith(".csv")]
    if tables:
        held += f" For the table in it, give config.data.root={root / tables[0]}."
    raise UserError(
        f"config.data.root: {root} has no folder {' and no folder '.join(missing)}. {held}\n"
        f"Expected one of\n{LAYOUTS}"
    )


def belongs_to_val(name: str, fraction: float, seed: int) -> bool:
    """Whether an image is one of a share that is val: by its name alone, whatever others there are.

    Its SHA-256 hash is a number in [0, 1), uniform over names.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class _Finder:
    """Pairs of the files under ROOT/images and ROOT/masks."""

    def __init__(self, root: pathlib.Path, mask_name: str) -> None:
        self.root = root
        self.images = root / "images"
        self.masks = root / "masks"
        self.mask_name = mask_name
        self.problems: list[str] = []
        self.skipped: list[pathlib.Path] = []

    def from_folders(self) -> Layout:
        splits = {}
        for split in SPLITS:
            images, masks = self.images / split, self.masks / split
            if images.is_dir() and masks.is_dir():
                splits[split] = self._all_pairs(images, masks)
            elif images.is_dir() or masks.is_dir():
                there, absent = (images, masks) if images.is_dir() else (masks, images)
                self.problems.append(f"{there}: has no counterpart {absent}")
        return Layout("folders", splits, self.problems, self.skipped)

    def from_lists(self) -> Layout:
        images, masks = self._files(self.images), self._files(self.masks)
        splits: dict[str, list[Pair]] = {}
        listed: dict[str, pathlib.Path] = {}
        for split in SPLITS:
            path = self.root / f"{split}.txt"
            if not path.is_file():
                continue
            names = _read_list(path)
            if not names:
                self.problems.append(f"{path}: names no image, expected one a line")
            twice = [name for name in names if name in listed]
            if twice:
                self.problems.append(
                    f"{path} and {listed[twice[0]]} share {len(twice)} images, as {twice[0]}: what "
                    "a model is trained on cannot measure it. Take them off one of the lists."
                )
            listed |= dict.fromkeys(names, path)
            unknown = [name for name in names if name not in images]
            for name in unknown[:MAX_PROBLEMS_TOLD]:
                self.problems.append(
                    f"{path}: names {name}, but there is no {self.images / name}.*"
                    f"{_nearest(name, images)}"
                )
            self.problems += [f"{path}: names {n}" for n in unknown[MAX_PROBLEMS_TOLD:]]
            known = {name: images[name] for name in names if name in images}
            splits[split] = self._pairs(known, masks, path, self.masks)
        return Layout("lists", splits, self.problems, self.skipped)

    def from_fraction(self, fraction: float, seed: int) -> Layout:
        splits: dict[str, list[Pair]] = {"train": [], "val": []}
        for pair in self._all_pairs(self.images, self.masks):
            splits["val" if belongs_to_val(pair.name, fraction, seed) else "train"].append(pair)
        return Layout("fraction", splits, self.problems, self.skipped)

    def _all_pairs(self, images_folder: pathlib.Path, masks_folder: pathlib.Path) -> list[Pair]:
        """Pairs of all images and all masks; one without the other is a problem."""
        images, masks = self._files(images_folder), self._files(masks_folder)
        if not images:
            self.problems.append(
                f"{images_folder}: holds no images ({', '.join(sorted(SUFFIXES))})"
            )
            return []
        expected = {_mask_of(name, self.mask_name): name for name in images}
        stray = [name for name in masks if name not in expected]
        pairs = self._pairs(images, masks, images_folder, masks_folder)
        if pairs:  # or the pattern is wrong, which was told
            near = [_nearest(name, expected) for name in stray[:MAX_PROBLEMS_TOLD]]
            near += [""] * (len(stray) - len(near))
            for name, hint in zip(stray, near, strict=True):
                self.problems.append(f"{masks[name]}: is the mask of no image{hint}")
        return pairs

    def _pairs(
        self,
        images: Mapping[str, pathlib.Path],
        masks: Mapping[str, pathlib.Path],
        listed_in: pathlib.Path,
        masks_folder: pathlib.Path,
    ) -> list[Pair]:
        pairs, alone = [], []
        for name, image in images.items():
            mask = masks.get(_mask_of(name, self.mask_name))
            if mask is None:
                alone.append(name)
            else:
                pairs.append(Pair(name, image, mask, listed_in))
        pattern = "" if pairs else _guess_pattern(alone, masks)
        if pattern:
            self.problems.append(
                f"{masks_folder}: masks are named as {next(iter(masks))} is: set "
                f"config.data.folder.mask_name={pattern}"
            )
            return []
        for place, name in enumerate(alone):
            expected = _mask_of(name, self.mask_name)
            hint = _nearest(expected, masks) if place < MAX_PROBLEMS_TOLD else ""
            self.problems.append(
                f"{images[name]}: has no mask {masks_folder / expected}.*{hint}. Add it, or move "
                "the image away"
            )
        return pairs

    def _files(self, folder: pathlib.Path) -> Files:
        """Images at any depth by name: the path in the folder, without the suffix."""
        found: Files = {}
        for parent, folders, files in os.walk(folder):
            folders.sort()
            for file in sorted(files):
                path = pathlib.Path(parent, file)
                if file.startswith(".") or file in ("Thumbs.db", "desktop.ini"):
                    continue
                if path.suffix.lower() not in SUFFIXES:
                    self.skipped.append(path)
                    continue
                name = path.relative_to(folder).with_suffix("").as_posix()
                if name in found:
                    self.problems.append(
                        f"{path} and {found[name]} have one name: keep one of them"
                    )
                found.setdefault(name, path)
        return found


def _mask_of(name: str, pattern: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/" * bool(folder) + pattern.replace("{name}", last)


def _guess_pattern(names: list[str], masks: Mapping[str, pathlib.Path]) -> str:
    """A pattern of names by which all images have a mask; empty if there is none."""
    if not names:
        return ""
    first = names[0].rpartition("/")[2]
    lasts = {mask.rpartition("/")[2] for mask in masks if first in mask}
    for mask in sorted(lasts, key=len):
        pattern = mask.replace(first, "{name}", 1)
        if all(_mask_of(name, pattern) in masks for name in names):
            return pattern
    return ""


def _nearest(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f" (nearest name: {close})" if close else ""


def _read_list(path: pathlib.Path) -> list[str]:
    names = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        name = line.strip()
        if name and not name.startswith("#"):
            suffix = pathlib.PurePosixPath(name).suffix
            names.append(name.removesuffix(suffix) if suffix.lower() in SUFFIXES else name)
    return list(dict.fromkeys(names))


def _from_csv(path: pathlib.Path, fraction: float, seed: int) -> Layout:
    """Pairs of a table; paths in it are relative to its folder."""
    rows = _read_csv(path)
    told = any(row["split"] for row in rows.values())
    splits: dict[str, list[Pair]] = {} if told else {"train": [], "val": []}
    problems: list[str] = []
    lines: dict[str, int] = {}
    for line, row in rows.items():
        image, mask = row["image"], row["mask"]
        name = pathlib.PurePath(image).with_suffix("").as_posix() if image else ""
        guess = "val" if belongs_to_val(name, fraction, seed) else "train"
        split = row["split"] if told else guess
        absent = [file for file in (image, mask) if not (path.parent / file).is_file()]
        if not image or not mask:
            problems.append(f"{path}: line {line} names no {'mask' if image else 'image'}")
        elif split not in SPLITS:
            problems.append(
                f"{path}: line {line} has split {split!r}, expected {', '.join(SPLITS)}"
            )
        elif name in lines:
            problems.append(f"{path}: lines {lines[name]} and {line} name one image, {image}")
        elif absent:
            near = (
                _nearest_file(path.parent / absent[0]) if len(problems) < MAX_PROBLEMS_TOLD else ""
            )
            problems.append(f"{path}: line {line} names {absent[0]}, which is not there{near}")
        else:
            pair = Pair(name, path.parent / image, path.parent / mask, path)
            splits.setdefault(split, []).append(pair)
        lines.setdefault(name, line)
    return Layout("csv", splits, problems, [])


def _read_csv(path: pathlib.Path) -> dict[int, dict[str, str]]:
    """Image, mask and split of each row, by the row's line."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        table = csv.DictReader(file, restval="", skipinitialspace=True)
        try:
            columns = [column.strip() for column in table.fieldnames or ()]
            table.fieldnames = columns
            rows = [(table.line_num, row) for row in table]
        except csv.Error as error:
            raise UserError(f"{path}: line {table.line_num} is no CSV ({error})") from None
    if not {"image", "mask"} <= set(columns):
        raise UserError(
            f"{path}: the first line must name the columns image, mask and, optionally, split; "
            f"it is {','.join(columns)[:80]!r}. Where config.data.root is a file, it is a CSV."
        )
    if not rows:
        raise UserError(f"{path}: names no image; expected a row for each")
    return {
        line: {column: row.get(column, "").strip() for column in ("image", "mask", "split")}
        for line, row in rows
    }


def _nearest_file(path: pathlib.Path) -> str:
    return _nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
