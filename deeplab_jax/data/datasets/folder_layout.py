"""Finds how a user's folder or CSV file pairs images with masks, and which splits they are in."""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import shlex

from deeplab_jax.config import DataConfig, FolderConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.pair_finder import FolderLayout, PairFinder, nearest_name
from deeplab_jax.data.datasets.pairing import SPELLINGS, SPLITS, Files
from deeplab_jax.data.datasets.polygon_folder import detect_coco, find_json
from deeplab_jax.data.datasets.proposals import has_split, propose
from deeplab_jax.data.datasets.splits import find_lists, split_by_hash, without_suffix
from deeplab_jax.data.io import lists
from deeplab_jax.data.io.images import SUFFIXES
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import find_files, is_hidden
from deeplab_jax.utils.paths import expand_home

LAYOUTS = """\
- images/train, images/val and masks/train, masks/val
- images and masks, with train.txt and val.txt, which list one name per line
- images and masks only: config.data.folder.val_fraction of them is val
- instead of a folder, a CSV file with the columns image, mask and split
- images, and COCO's JSON file, or LabelMe's with the names of the images
- other names that say which mask belongs to an image, such as train/x.jpg and train/x_mask.png; if
  they are not found, set config.data.folder.image_pattern and mask_pattern, in this example to
  {split}/{name}.jpg and {split}/{name}_mask.png"""


def detect_layout(config: DataConfig) -> FolderLayout:
    """Detects the layout of `config.root` by the names of its files. Opens no image.

    Raises:
      UserError: the root has none of the layouts, or several.
    """
    if not config.root:
        raise UserError(
            "config.data.root is empty: set it to the folder of your images and masks. It holds "
            f"one of\n{LAYOUTS}"
        )
    root, folder = expand_home(config.root), config.folder
    if root.is_file() and root.suffix.lower() == ".json":
        return detect_coco(root, (), folder)
    if root.is_file():
        return _from_csv(root, folder)
    if not root.is_dir():
        raise UserError(f"config.data.root: there is no folder {root}")
    if folder.image_pattern:
        return _from_settings(root, folder)
    layout = None
    if (root / "images").is_dir() and (root / "masks").is_dir():
        layout = _standard(root, folder)
        if any(layout.splits.values()):
            return layout
    return _from_proposal(root, folder, layout)


def _standard(root: pathlib.Path, config: FolderConfig) -> FolderLayout:
    """Pairs the folders images and masks, which may hold a folder for each split."""
    folders = [root / "images", root / "masks"]
    for images, masks in ([folder / name for folder in folders] for name in ("", *SPLITS)):
        if images.is_dir() and masks.is_dir() and os.path.samefile(images, masks):
            real, known = os.path.realpath(images), root / "classes.txt"
            classes = config.classes or (str(known) if known.is_file() else "")
            use = f" and config.data.folder.classes={shlex.quote(classes)}" if classes else ""
            raise UserError(
                f"config.data.root: {images} and {masks} are one folder, {real}: each image would "
                "be its own mask. To use the images and masks that are in it, set "
                f"config.data.root={shlex.quote(real)}{use}"
            )
    has_splits = any(p.name.lower() in SPELLINGS and p.is_dir() for p in folders[0].iterdir())
    middle = "{split}/" if has_splits else ""
    files = Files(root, itertools.chain(*map(find_files, folders)))
    pairing = files.pair(f"images/{middle}{{name}}.*", f"masks/{middle}{config.mask_name}.*")
    layout = PairFinder(root, config, files, pairing, "standard").find()
    if not pairing.images:
        layout.problems.append(f"{folders[0]}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return layout


def _from_settings(root: pathlib.Path, config: FolderConfig) -> FolderLayout:
    files = Files(root, find_files(root))
    pairing = files.pair(config.image_pattern, config.mask_pattern)
    for kind, pattern, found in (
        ("image", pairing.image_pattern, pairing.images),
        ("mask", pairing.mask_pattern, pairing.masks),
    ):
        if not found:
            raise UserError(
                f"config.data.folder.{kind}_pattern: {pattern.text} matches no file below {root}. "
                + _describe_files(files)
            )
    return PairFinder(root, config, files, pairing, "settings").find()


def _from_csv(table: pathlib.Path, config: FolderConfig) -> FolderLayout:
    """Returns the pairs of a table; its paths are relative to the folder of the CSV file."""
    folder = table.parent
    rows = lists.read_table(table)
    has_splits = any(row["split"] for row in rows.values())
    problems: list[str] = []
    splits: dict[str, list[Pair]] = {}
    lines: dict[str, int] = {}
    for line, row in rows.items():
        image, mask = (_existing_path(folder, row[column]) for column in ("image", "mask"))
        name = pathlib.PurePath(image).with_suffix("").as_posix() if image else ""
        split = SPELLINGS.get(row["split"].lower(), "") if has_splits else "train"
        missing = next((file for file in (image, mask) if not os.path.isfile(folder / file)), None)
        problem = ""
        if not image or not mask:
            problem = f"names no {'mask' if image else 'image'}"
        elif not split:
            problem = f"has split {row['split']!r}, expected {', '.join(SPLITS)}"
        elif name in lines:
            problem = f"names the image {image} of line {lines[name]} again"
        elif missing and os.path.isdir(folder / missing):
            problem = f"names {missing}, which is a folder"
        elif missing:
            expected = folder / missing
            siblings = os.listdir(expected.parent) if expected.parent.is_dir() else ()
            hint = nearest_name(expected.name, siblings, problems)
            problem = f"names {missing}, which does not exist{hint}"
        else:
            splits.setdefault(split, []).append(Pair(name, folder / image, folder / mask, table))
        if problem:
            problems.append(f"{table}: line {line} {problem}")
        lines.setdefault(name, line)
    if not has_splits:
        splits = split_by_hash(splits.get("train", []), config)
    return FolderLayout("csv", splits, problems, [])


def _existing_path(folder: pathlib.Path, path: str) -> str:
    """Replaces the backslashes of a path in a table by slashes, unless there is such a file."""
    return path if os.path.isfile(folder / path) else path.replace("\\", "/")


def _from_proposal(
    root: pathlib.Path, config: FolderConfig, standard: FolderLayout | None
) -> FolderLayout:
    """Returns the layout whose patterns fit the files, or else the standard one."""
    inner = _only_folder(root)
    if inner != root:
        raise UserError(
            f"config.data.root: {root} holds only the folder {inner.relative_to(root)}. Set "
            f"config.data.root={shlex.quote(str(inner))}"
        )
    paths = find_files(root)
    coco = detect_coco(root, paths, config)
    if coco.splits:  # no COCO file is the mask of one image
        unused = set(find_json(paths))
        paths = [path for path in paths if path not in unused]
    files = Files(root, paths)
    names = _listed_names(root)
    proposals = propose(files, names) or (propose(files) if names else [])
    if coco.splits:
        if not any(proposal.is_of_masks for proposal in proposals):
            return coco
        file = next((pair.listed_in for pair in itertools.chain(*coco.splits.values())), root)
        raise UserError(
            f"config.data.root: {root} has polygons and masks. Choose the polygons with\n"
            f"--config.data.root={shlex.quote(str(file))}\nor the masks with\n"
            f"{proposals[0].pairing.settings}"
        )
    if len(proposals) > 1:
        choices = "\n".join(f"- {proposal.pairing.settings}" for proposal in proposals)
        raise UserError(
            f"config.data.root: {root} has several files for each image that may be its mask, or "
            f"several folders of images. Choose one of\n{choices}"
        )
    if not proposals:
        if standard:
            return standard
        raise UserError("\n".join([_describe_root(root, files), *coco.problems[:3]]))
    pairing = proposals[0].pairing
    if config.mask_name != "{name}":
        raise UserError(
            f"config.data.folder.mask_name: {config.mask_name} fits no mask of {root}. Set "
            f"--config.data.folder.mask_name='{{name}}' {pairing.settings}"
        )
    layout = PairFinder(root, config, files, pairing, "names").find()
    images, masks = pairing.image_pattern.text, pairing.mask_pattern.text
    layout.notes.insert(
        0,
        f"found: images {images}, masks {masks} (config.data.folder.image_pattern, mask_pattern)",
    )
    if len(proposals[0].pairs) < proposals[0].num_images:
        number = f"{len(proposals[0].pairs)} of {proposals[0].num_images}"
        layout.problems.insert(
            0, f"{root}: images {images} and masks {masks} fit, but only for {number} images"
        )
    return layout


def _only_folder(root: pathlib.Path) -> pathlib.Path:
    """Returns the folder in a root that holds nothing else, at any depth, or else the root."""
    paths = [path for path in root.iterdir() if not is_hidden(path.name)]
    inner = paths[0] if len(paths) == 1 else root
    if not inner.is_dir() or inner.name.lower() in ("images", "masks") or has_split(inner.name):
        return root
    return root if inner == root else _only_folder(inner)


def _listed_names(root: pathlib.Path) -> set[str] | None:
    """Returns the last components of all names in lists of splits, without suffixes."""
    found, _ = find_lists(root)
    if not found:
        return None
    lines = itertools.chain(*(lists.read_lines(path) for path in found.values()))
    ways = itertools.chain(*map(lists.split_line, lines))
    return {pathlib.PurePosixPath(without_suffix(way[0].replace("\\", "/"))).name for way in ways}


def _describe_root(root: pathlib.Path, files: Files) -> str:
    missing = [name for name in ("images", "masks") if not (root / name).is_dir()]
    names = sorted(path.name for path in root.iterdir() if not is_hidden(path.name))
    found = f"It holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}." if names else ""
    tables = [name for name in names if name.lower().endswith(".csv")]
    if tables:
        found += f" To use the table in it, set config.data.root={root / tables[0]}."
    return (
        f"config.data.root: {root} has no folder {' and no folder '.join(missing)}, and no mask "
        f"was found for its images by their names. {found} {_describe_files(files)}\n"
        f"Expected one of\n{LAYOUTS}"
    )


def _describe_files(files: Files) -> str:
    """Says how many files of which suffix the largest folders hold."""
    counts = collections.Counter(
        (path.parent.as_posix(), path.suffix) for path in map(pathlib.PurePosixPath, files.paths)
    )
    kinds = [f"{folder}/*{suffix} ({n})" for (folder, suffix), n in counts.most_common(8)]
    return f"Files below it: {', '.join(kinds) or 'none'}."
