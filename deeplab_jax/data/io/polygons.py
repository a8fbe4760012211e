"""JSON files of polygons: what COCO's and LabelMe's have in common.

A LabelMe file is the mask of one image. In a COCO file, the mask of an image has the virtual path
`annotations.json/ID`, where ID is the image's id.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from deeplab_jax.data.io.images import MAX_PIXELS
from deeplab_jax.data.io.lists import read_text
from deeplab_jax.data.labels import is_background
from deeplab_jax.utils.errors import UserError, listed

IGNORED = "__ignore__"  # the label of labelme for pixels that do not count

# pycocotools and Pillow walk along edges, and would not come back from one of 10^12 pixels.
_MAX_COORDINATE = 1e5

_KEYS = {"COCO": ("images", "annotations", "categories"), "LabelMe": ("shapes",)}


class OtherFormatError(UserError):
    """A JSON file is not of the expected format."""


class ShapeError(UserError):
    """A shape of a readable file cannot be drawn."""


@contextlib.contextmanager
def shape_errors(title: str) -> Iterator[None]:
    """Turns errors of pycocotools and Pillow, which are of many types, into a ShapeError."""
    try:
        yield
    except Exception as error:
        raise ShapeError(f"{title} cannot be drawn ({error}).") from None


def is_json(mask: pathlib.Path) -> bool:
    """Whether a mask is a LabelMe file or an image of a COCO file."""
    return mask.suffix.lower() == ".json" or is_coco(mask)


def is_coco(mask: pathlib.Path) -> bool:
    return mask.parent.suffix.lower() == ".json"


def class_id(label: str, names: Sequence[str], ignore_label: int) -> int:
    """Returns the id of a label, -1 if no class has it.

    Background is the class that is spelled so, else the first one.
    """
    if label in names:
        return names.index(label)
    if label == IGNORED:
        return ignore_label
    if not is_background(label):
        return -1
    return next((i for i, name in enumerate(names) if is_background(name)), 0)


def read_json(
    path: pathlib.Path, kind: str, pack: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """Reads a JSON file of a kind, "COCO" or "LabelMe"; `pack` replaces each object when parsed.

    Raises:
      UserError: the file cannot be read, or is not JSON.
      OtherFormatError: it is of another format.
    """
    text = read_text(path)
    try:
        content = json.loads(text, object_hook=pack)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is truncated, or not JSON ({error}). Export it again.") from None
    keys = list(content) if isinstance(content, dict) else []
    if len(set(_KEYS[kind]).intersection(keys)) <= len(_KEYS[kind]) // 2:
        raise OtherFormatError(
            f"{path}: has the keys {listed(keys) or 'of no object'}, expected those of {kind}: "
            f"{listed(_KEYS[kind])}. config.data.root is a COCO file, or the folder of LabelMe's "
            "files and their images."
        )
    return content


def read_entries(
    content: Mapping[str, Any], key: str, fields: Sequence[str], problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Yields the entries of a list that have all fields; adds a problem if there are others."""
    entries = content.get(key)
    wrong: list[str] = []
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        known = entry if isinstance(entry, dict) else {}
        missing = [field for field in fields if known.get(field) is None]
        if not missing:
            yield known
        else:
            wrong.append(f"{key}[{index}] has no {' and no '.join(missing)}")
    if wrong:
        problems.append(wrong[0] + (f", and {len(wrong) - 1} others" if len(wrong) > 1 else ""))


def read_size(*sides: Any) -> tuple[int, int] | None:
    """Returns the sides of an image as whole numbers; None: they cannot be."""
    try:
        first, second = map(int, sides)
    except (TypeError, ValueError, OverflowError):
        return None
    return (first, second) if min(first, second) > 0 and first * second <= MAX_PIXELS else None


def check_points(coordinates: Shaped[np.ndarray, " xy"]) -> Shaped[np.ndarray, "n 2"]:
    """Returns x, y, x, y, ... as points. Raises ValueError unless they are pixels."""
    if coordinates.size % 2:
        raise ValueError(f"it has an odd number of coordinates, {coordinates.size}")
    if not (np.abs(coordinates) <= _MAX_COORDINATE).all():  # and NaN
        raise ValueError(f"coordinates must be pixels, got {coordinates[:6].tolist()} ...")
    return coordinates.reshape(-1, 2)
