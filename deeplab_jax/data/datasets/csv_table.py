"""Finds the pairs of images and masks that a CSV table names."""

from __future__ import annotations

import os
import pathlib

from deeplab_jax.config import FolderConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.pair_finder import FolderLayout, nearest_name
from deeplab_jax.data.datasets.pairing import SPELLINGS, SPLITS
from deeplab_jax.data.datasets.splits import split_by_hash
from deeplab_jax.data.io import lists


def find_csv(table: pathlib.Path, config: FolderConfig) -> FolderLayout:
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
        missing = [file for file in (image, mask) if not os.path.isfile(folder / file)]
        problem = ""
        if not image or not mask:
            problem = f"names no {'mask' if image else 'image'}"
        elif not split:
            problem = f"has split {row['split']!r}, expected {', '.join(SPLITS)}"
        elif name in lines:
            problem = f"names the image {image} of line {lines[name]} again"
        elif missing and os.path.isdir(folder / missing[0]):
            problem = f"names {missing[0]}, which is a folder"
        elif missing:
            expected = folder / missing[0]
            siblings = os.listdir(expected.parent) if expected.parent.is_dir() else ()
            hint = nearest_name(expected.name, siblings, problems)
            problem = f"names {missing[0]}, which does not exist{hint}"
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
