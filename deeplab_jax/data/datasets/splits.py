"""Splits of pairs: the text files that list their images, and fractions of all pairs."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping, Sequence

from deeplab_jax.config import FolderConfig
from deeplab_jax.data.dataset import Pair
from deeplab_jax.data.datasets.pairing import SPELLINGS, normal_form
from deeplab_jax.data.io.images import SUFFIXES

# Where lists of splits are, below the root; the second one is VOC's.
_LIST_FOLDERS = ("", "ImageSets/Segmentation")


def find_lists(root: pathlib.Path) -> tuple[dict[str, pathlib.Path], list[str]]:
    """Returns the list of each split, and a problem for each split that has two."""
    found: dict[str, pathlib.Path] = {}
    problems = []
    for folder in (root / name for name in _LIST_FOLDERS):
        for path in sorted(folder.iterdir()) if folder.is_dir() and not found else ():
            split = SPELLINGS.get(path.stem.lower())
            if not split or path.suffix.lower() != ".txt" or not path.is_file():
                continue
            if found.setdefault(split, path) != path:
                problems.append(two_spellings(split, found[split], path))
    return found, problems


def two_spellings(split: str, *paths: pathlib.Path) -> str:
    return f"{' and '.join(map(str, paths))} both mean {split}. Merge them, or rename one"


def find_name(text: str, known: Mapping[str, str], folder: str) -> str | None:
    """Returns the name that a list's text means, of those known by their spellings.

    The text may have a suffix or backslashes, and be a path, in which names follow `folder`.
    """
    text = normal_form(text)
    for path in (text, text.replace("\\", "/")):
        parts = pathlib.PurePosixPath(path).parts
        starts = [0, *(index + 1 for index, part in enumerate(parts) if part == folder)]
        for name in ("/".join(parts[start:]) for start in starts):
            for each in (without_suffix(name), name):
                if each in known:
                    return known[each]
    return None


def without_suffix(name: str) -> str:
    suffix = pathlib.PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in SUFFIXES else name


def split_by_hash(pairs: Sequence[Pair], config: FolderConfig) -> dict[str, list[Pair]]:
    """Divides pairs into train and val by a hash of the name and the seed; see docs/own_data.md.

    Pairs whose hash is below `val_fraction` are val, so that adding pairs moves no others, except
    that of two or more the smallest hash is val and the largest train. 0 or 1 is none or all.
    """
    hashes = {}
    for pair in pairs:
        # Names need not be UTF-8.
        text = f"{config.seed}/{pair.name}".encode(errors="surrogateescape")
        hashes[pair.name] = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    limit = config.val_fraction * 2**64
    if 0 < config.val_fraction < 1 and len(hashes) > 1:
        # At least the smallest is below, and the largest is not.
        limit = min(max(limit, min(hashes.values()) + 1), max(hashes.values()))
    splits: dict[str, list[Pair]] = {"train": [], "val": []}
    for pair in pairs:
        splits["val" if hashes[pair.name] < limit else "train"].append(pair)
    return splits
