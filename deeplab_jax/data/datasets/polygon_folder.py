"""Finds the images of COCO files in a user's folder, and the classes of COCO and LabelMe files."""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from deeplab_jax.config import DataConfig, FolderConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.pair_finder import FolderLayout
from deeplab_jax.data.datasets.pairing import SPELLINGS
from deeplab_jax.data.datasets.proposals import looks_like_mask
from deeplab_jax.data.datasets.splits import split_by_hash
from deeplab_jax.data.io import coco_json, labelme_json, polygons
from deeplab_jax.data.io.classes import ClassTable
from deeplab_jax.data.io.coco_json import CocoFile
from deeplab_jax.data.io.images import SUFFIXES
from deeplab_jax.data.io.polygons import OtherFormatError
from deeplab_jax.data.labels import IGNORE, LabelSet, is_background, named
from deeplab_jax.utils.errors import UserError, did_you_mean, listed, nearest, raise_problems
from deeplab_jax.utils.files import find_files

_MAX_OTHERS = 16  # a folder of more JSON files of other formats is not searched for COCO's


def find_json(files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the JSON files that may be COCO's: none with the name of an image, as LabelMe's."""
    stems = {path.stem for path in files if _is_image(path)}
    return [path for path in files if path.suffix.lower() == ".json" and path.stem not in stems]


def detect_coco(
    root: pathlib.Path, files: Sequence[pathlib.Path], config: FolderConfig
) -> FolderLayout:
    """Finds the images that COCO files list.

    The root is a COCO file, or a folder of these files. Without any, the layout has no splits, and
    its problems are JSON files that are broken or of another format.

    Raises:
      UserError: pycocotools is not installed; or `root` is a file, but not one of COCO's.
    """
    layout = FolderLayout("coco", {}, [], [])
    base = root
    if root.is_file():
        contents, base = {root: coco_json.read(root)}, root.parent
        files = find_files(base)
        if not any(map(_is_image, files)):  # as of `annotations/instances.json` beside `images`
            base = base.parent
            files = find_files(base)
    else:
        contents = _read_all(find_json(files), layout)
    if not contents:
        return layout
    coco_json.require_pycocotools()
    layout.notes.append(
        f"found: polygons in {listed([*map(str, contents)])}; where regions overlap, the smallest "
        "is on top"
    )
    finder = _ImageFinder(base, files, layout.problems)
    for content in contents.values():
        layout.problems.extend(content.problems)
        layout.notes.extend(content.notes)
    for split, paths in _sort_by_split(base, contents, layout).items():
        pairs = (finder.pair(path, contents[path], split) for path in paths)
        layout.splits[split] = list(itertools.chain(*pairs))
    if not layout.splits.get("val"):
        source = "train" if "train" in layout.splits else ""
        layout.splits.update(split_by_hash(layout.splits.pop(source, []), config))
        layout.notes.append(
            f"no JSON file is of val: the fraction {config.val_fraction:g} of "
            f"{source or 'the images'} is val (config.data.folder.val_fraction)"
        )
    unlisted = [path for path in finder.images - finder.claimed.keys() if not finder.is_mask(path)]
    if unlisted and finder.claimed:
        layout.notes.append(
            f"{len(unlisted)} images are in no JSON file and not used, as {min(unlisted)}"
        )
    return layout


def _is_image(path: pathlib.Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _read_all(paths: Iterable[pathlib.Path], layout: FolderLayout) -> dict[pathlib.Path, CocoFile]:
    """Reads the COCO files that hold regions. Files of captions and keypoints are skipped."""
    found: dict[pathlib.Path, CocoFile] = {}
    others: dict[pathlib.Path, list[str]] = defaultdict(list)  # by folder
    for path in paths:
        if len(others[path.parent]) >= _MAX_OTHERS:
            continue
        try:
            found[path] = coco_json.read(path)
        except OtherFormatError as error:
            others[path.parent].append(str(error))
        except UserError as error:
            layout.problems.append(str(error))
    if not found:
        layout.problems.extend(itertools.chain(*others.values()))
        return {}
    drawn = {path for path, one in found.items() if any(r.segmentation for r in one.regions)}
    used = {
        path: one
        for path, one in found.items()
        if path in drawn or one.problems or (drawn and not one.regions)
    }
    used = {path: one for path, one in used.items() if path.name.startswith("instances")} or used
    if not used:
        layout.problems.append(
            f"{next(iter(found))}: has no polygons and no masks: it has only boxes or texts, or no "
            "annotation. Export the set for segmentation"
        )
        return found
    layout.skipped.extend(path for path in found if path not in used)
    return used


def _sort_by_split(
    base: pathlib.Path, paths: Iterable[pathlib.Path], layout: FolderLayout
) -> dict[str, list[pathlib.Path]]:
    """Returns the files of each split, by words in their names, else of their folders.

    The files are of the split "" if no two are of different splits.
    """
    splits: dict[str, list[pathlib.Path]] = defaultdict(list)
    for path in paths:
        folders = path.relative_to(base).parts[-2::-1]
        found = (_splits_in(text) for text in (path.stem, *folders))
        splits[next((each.pop() for each in found if len(each) == 1), "")].append(path)
    if len(splits) == 1:
        return {"": next(iter(splits.values()))}
    for path in splits.pop("", ()):
        layout.skipped.append(path)
        layout.notes.append(f"{path}: is not used, because its name has no split as others have")
    return splits


def _splits_in(text: str) -> set[str]:
    """Returns the splits that words of a text mean, as in `instances_train2017`."""
    words = re.findall("[a-z]+", text.lower())
    return {SPELLINGS[word] for word in words if word in SPELLINGS}


class _ImageFinder:
    """Finds the images that COCO files mean, of those below a folder."""

    def __init__(
        self, base: pathlib.Path, files: Iterable[pathlib.Path], problems: list[str]
    ) -> None:
        self.base = base
        self.images = set(filter(_is_image, files))
        self.claimed: dict[pathlib.Path, pathlib.Path] = {}  # the file that lists each image
        self._problems = problems
        self._by_name: dict[str, list[pathlib.Path]] = defaultdict(list)
        for path in sorted(self.images):
            self._by_name[path.name].append(path)

    def is_mask(self, path: pathlib.Path) -> bool:
        return looks_like_mask(str(path.relative_to(self.base)))

    def pair(self, path: pathlib.Path, content: CocoFile, split: str) -> list[Pair]:
        """Returns the pairs of a COCO file of a split."""
        pairs, missing = [], []
        for key, one in content.images.items():
            found = self._find(path, one.file_name, split)
            if not found:
                missing.append(one.file_name)
            elif len(found) > 1:
                names = listed([str(each) for each in found])
                self._problems.append(f"{path}: {one.file_name} (image id {key}) may be {names}")
            elif found[0] in self.claimed:
                other = self.claimed[found[0]]
                self._problems.append(f"{path}: lists {found[0]}, as does {other}. Keep it once")
            else:
                self.claimed[found[0]] = path
                name = found[0].relative_to(self.base).with_suffix("").as_posix()
                pairs.append(Pair(name, found[0], path / key, path))
        if missing:
            self._problems.append(
                f"{path}: {len(missing)} of the {len(content.images)} images that it lists are not "
                f"below {self.base}: {listed(missing)}. Put them there, or set config.data.root to "
                "a folder that holds the file and the images"
            )
        return pairs

    def _find(self, path: pathlib.Path, file_name: str, split: str) -> list[pathlib.Path]:
        """Returns the images that may be meant: beside the file, else those of the same name."""
        text = file_name.replace("\\", "/")
        exact = pathlib.Path(os.path.normpath(path.parent / text))
        if exact in self.images:
            return [exact]
        name = text.rpartition("/")[2]
        # Label Studio quotes names, and puts 8 digits in front of them.
        spellings = (name, urllib.parse.unquote(name), re.sub("^[0-9a-f]{8}-", "", name))
        found = next(filter(None, map(self._by_name.get, spellings)), [])
        ways: tuple[Callable[[pathlib.Path], bool], ...] = (
            lambda image: image.as_posix().endswith("/" + text.lstrip("./")),
            lambda image: not self.is_mask(image),
            lambda image: image.is_relative_to(path.parent),
            lambda image: split in _splits_in(image.parent.as_posix()),
        )
        for is_better in ways:
            found = list(filter(is_better, found)) or found
        return found


def read_labels(
    config: DataConfig, masks: Sequence[pathlib.Path], table: ClassTable | None
) -> tuple[LabelSet, list[str]]:
    """Returns the classes of COCO and LabelMe files, and notes.

    Without a file of classes, they are background and the categories by id, or the labels of all
    LabelMe files by name. Otherwise, its names choose and order the classes; other categories of
    COCO are background. Background becomes the first class if the file does not name it.

    Raises:
      UserError: masks are of several kinds, names do not match, or settings are for images.
    """
    if config.folder.masks_hold in ("colors", "binary") or config.folder.threshold is not None:
        raise UserError(
            "config.data.folder.masks_hold and threshold are for images, not polygons. Remove them"
        )
    kinds = {(polygons.is_json(mask), polygons.is_coco(mask)): mask for mask in masks}
    if len(kinds) > 1:
        raise UserError(
            f"{' and '.join(map(str, kinds.values()))}: masks of one set must be of one kind: "
            "images, LabelMe files, or COCO files. config.data.folder.mask_pattern chooses one, as "
            "{name}.json"
        )
    names = table.labels.names if table else ()
    has_background = any(map(is_background, names))
    is_coco = polygons.is_coco(masks[0])
    if table and has_background and not is_coco:
        return table.labels, []  # labels are compared when they are drawn
    found, notes = (_categories if is_coco else _labels)(masks)
    found = [name for name in found if not is_background(name) and name != polygons.IGNORED]
    if table is None:
        if not 1 <= len(found) < IGNORE:
            raise UserError(
                f"{masks[0]}: this set has {len(found)} classes, expected 1 to {IGNORE - 1}. "
                "Choose some in classes.txt, one name per line"
            )
        return named("background", *found), [*notes, f"the classes are background, {listed(found)}"]
    left = [name for name in found if name not in names]
    unknown = (name for name in names if name not in found and not is_background(name))
    if typos := [f"{name!r}{did_you_mean(name, left)}" for name in unknown if nearest(name, left)]:
        raise UserError(f"{table.path}: no categories are {listed(typos)}")
    if len(left) == len(found):
        raise UserError(f"{table.path}: names none of {listed(found)}, the classes in {masks[0]}")
    if left and is_coco:
        notes.append(f"categories that {table.path} does not name are background: {listed(left)}")
    if has_background or names[0] not in found:  # a first class without shapes is background
        return table.labels, notes
    notes.append(f"background is class 0: {table.path} does not name it")
    return LabelSet(("background", *names), ((0, 0, 0), *table.labels.colors)), notes


def _categories(masks: Sequence[pathlib.Path]) -> tuple[list[str], list[str]]:
    """Returns the categories of COCO files, without those that only stand for others, and notes."""
    files = [coco_json.read(path) for path in dict.fromkeys(mask.parent for mask in masks)]
    names = dict.fromkeys(name for one in files for name in one.categories)
    groups = {one.group for one in files if one.group}
    groups -= {name for one in files for name in one.categories if name != one.group}
    notes = [
        f"the category {name!r} of id 0 stands for the others, has no annotation, and is no class"
        for name in sorted(groups)
    ]
    return [name for name in names if name not in groups], notes


def _labels(masks: Sequence[pathlib.Path]) -> tuple[list[str], list[str]]:
    """Returns the labels of LabelMe files, and notes on files that cannot be read."""
    found, problems = set[str](), []
    for path in masks:
        try:
            found.update(shape["label"] for shape in labelme_json.read(path)["shapes"])
        except UserError as error:  # training raises it when it reads the file
            problems.append(str(error))
    if not found:
        raise_problems("the LabelMe files have no labels", problems)
    return sorted(found), problems
