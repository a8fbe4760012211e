"""COCO files: JSON with polygons and run-length codes, drawn to class ids by pycocotools."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from deeplab_jax.data.io import polygons
from deeplab_jax.utils.errors import UserError, listed

_PARSE_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """An annotation: polygons, each `[x, y, x, y, ...]`, or a run-length code as pycocotools'."""

    id: Any
    category: str
    segmentation: Any


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """An image of a COCO file, and its annotations."""

    file_name: str
    height: int
    width: int
    regions: list[Region]


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """The contents of a COCO file, without wrong entries, which are problems.

    Attributes:
      categories: names of the categories, in the order of their ids; each once.
      group: the category that stands for the others and has no annotation, as Roboflow's of id 0.
      images: by id.
      problems, notes: sentences for the user.
    """

    categories: tuple[str, ...]
    group: str
    images: dict[str, CocoImage]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def regions(self) -> list[Region]:
        return [region for one in self.images.values() for region in one.regions]


def require_pycocotools() -> None:
    """Raises UserError if pycocotools is not installed."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            "COCO's annotations are decoded with pycocotools, which is not installed: "
            "pip install 'deeplab-jax[coco]'."
        )


def read(path: pathlib.Path) -> CocoFile:
    """Reads a COCO file; once per process, until it changes.

    Raises:
      UserError: the file cannot be read, or is not one of COCO's.
    """
    modified = path.stat().st_mtime_ns if path.exists() else 0
    with _PARSE_LOCK:  # threads of the check wait instead of parsing it too
        return _parse_coco(path, modified)


@functools.cache
def _parse_coco(path: pathlib.Path, modified: int) -> CocoFile:
    content = polygons.read_json(path, "COCO", _pack)
    problems, notes = list[str](), list[str]()
    names: dict[str, str] = {}
    groups: set[str] = set()  # supercategories
    for one in polygons.read_entries(content, "categories", ("id", "name"), problems):
        key, name = _key(one["id"]), str(one["name"]).strip()
        if names.setdefault(key, name) != name:
            problems.append(f"the categories {names[key]!r} and {name!r} have one id, {key}")
        if one.get("supercategory") != name:
            groups.add(str(one.get("supercategory")))
    times = collections.Counter(names.values())
    repeated = sorted(name for name, number in times.items() if number > 1)
    notes += [f"categories of the name {name!r} are one class" for name in repeated]

    images = _read_images(content, problems)
    num_unknown, used = 0, set()
    for one in polygons.read_entries(content, "annotations", ("image_id", "category_id"), problems):
        key, category = _key(one["image_id"]), _key(one["category_id"])
        used.add(category)
        if category not in names:
            problems.append(
                f"annotation {one.get('id')} has the category {category}, expected one of "
                + listed([f"{each} ({name})" for each, name in names.items()])
            )
        elif key in images:
            region = Region(one.get("id"), names[category], one.get("segmentation"))
            images[key].regions.append(region)
        else:
            num_unknown += 1
    if num_unknown:
        notes.append(f"{num_unknown} annotations are of images that it does not list, and not used")
    ordered = sorted(names, key=lambda key: (not key.isdecimal(), key.zfill(20)))
    return CocoFile(
        tuple(dict.fromkeys(names[key] for key in ordered)),
        names.get("0", "") if "0" not in used and names.get("0") in groups else "",
        images,
        tuple(f"{path}: {problem}" for problem in problems),
        tuple(f"{path}: {note}" for note in notes),
    )


def _read_images(content: dict[str, Any], problems: list[str]) -> dict[str, CocoImage]:
    images: dict[str, CocoImage] = {}
    fields = ("id", "file_name", "height", "width")
    for one in polygons.read_entries(content, "images", fields, problems):
        key, name = _key(one["id"]), str(one["file_name"])
        size = polygons.read_size(one["height"], one["width"])
        if size is None:
            sides = f"height {one['height']!r} and width {one['width']!r}"
            problems.append(f"the image {name} (id {key}) has {sides}, expected pixels")
        elif key in images:
            problems.append(f"the images {images[key].file_name} and {name} have one id, {key}")
        else:
            images[key] = CocoImage(name, *size, [])
    if not images and not problems:
        problems.append("lists no images")
    return images


def _key(number: Any) -> str:
    """Returns an id as one part of a path; 5.0 is 5."""
    number = int(number) if isinstance(number, float) and number.is_integer() else number
    return str(number).replace("/", "%2F")


def _pack(entry: dict[str, Any]) -> dict[str, Any]:
    """Stores polygons as arrays, in a fraction of the memory of lists."""
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, list):
        nested = any(isinstance(one, list) for one in segmentation)
        with contextlib.suppress(TypeError, ValueError):  # `draw` says what is wrong
            entry["segmentation"] = [
                np.array(one, np.float64)
                for one in (segmentation if nested else [segmentation])
                if one
            ]
    return entry


def encode(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Returns pycocotools' run-length code of a segmentation, or raises any error if damaged."""
    from pycocotools import mask as coco_mask

    if not isinstance(segmentation, dict):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    size, counts = segmentation["size"], segmentation["counts"]
    if list(size) != [height, width]:
        raise ValueError(f"its size is {size}, its image's {[height, width]}")
    if not isinstance(counts, str | bytes):
        return coco_mask.frPyObjects(segmentation, height, width)
    data = counts.encode() if isinstance(counts, str) else counts
    if data[-1] - 48 & 32:  # more bits follow, which pycocotools would read from other memory
        raise ValueError("its counts are truncated")
    return segmentation


def decode(segmentation: Any, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Decodes what `encode` takes. pycocotools decides on the pixels of edges."""
    from pycocotools import mask as coco_mask

    code = encode(segmentation, height, width)
    mask = coco_mask.decode(code)
    if mask.sum() != coco_mask.area(code):  # pixels after the last count are left to chance
        raise ValueError("its counts are of fewer pixels than the image has")
    return mask.view(bool)


def draw(
    path: pathlib.Path,
    key: str,
    names: Sequence[str],
    ignore_label: int,
    remarks: list[tuple[str, str]],
) -> UInt8[np.ndarray, "h w"]:
    """Draws the regions of the image of an id, smaller ones on top of larger ones.

    Crowd regions count as others do: CVAT marks all masks as crowd. Regions of no class are not
    drawn. Those without pixels ("not drawn") and "overlaps" of classes are added to `remarks`.

    Raises:
      UserError: the file cannot be read, or does not list the image.
      ShapeError: a segmentation is damaged.
    """
    from pycocotools import mask as coco_mask

    image = read(path).images.get(key)
    if image is None:
        raise UserError(f"{path}: lists no image of the id {key}.")
    size = image.height, image.width
    codes: list[tuple[int, int, str, dict[str, Any]]] = []  # area, class, title, run-length code
    for region in image.regions:
        class_id = polygons.class_id(region.category, names, ignore_label)
        title = f"{path}: annotation {region.id} ({region.category}) of {image.file_name}"
        if class_id >= 0:
            with polygons.shape_errors(title):
                code = encode(_drop_short(region.segmentation, *size), *size)
                codes.append((int(coco_mask.area(code)), class_id, title, code))
    background = polygons.class_id("background", names, ignore_label)
    label = np.full(size, background, np.uint8)
    overlapping = np.zeros(size, bool)
    for area, class_id, title, code in sorted(codes, key=lambda one: -one[0]):
        if not area:
            place = f"in the image ({image.width} x {image.height})"
            remarks.append(("not drawn", f"{title} has no pixel {place}, or no polygon"))
            continue
        with polygons.shape_errors(title):
            inside = decode(code, *size)
        left, top, width, height = map(int, coco_mask.toBbox(code))
        box = np.s_[top : top + height, left : left + width]
        inside, below = np.ascontiguousarray(inside[box]), label[box]
        overlapping[box] |= inside & (below != background) & (below != class_id)
        below[inside] = class_id
    if overlapping.any():
        number = np.count_nonzero(overlapping)
        remarks.append(("overlaps", f"{path / key}: {number} pixels of {image.file_name}"))
    return label


def _drop_short(segmentation: Any, height: int, width: int) -> Any:
    """Drops polygons of fewer than 3 points, which pycocotools takes for boxes."""
    if isinstance(segmentation, dict):
        return segmentation
    found = [np.asarray(polygon, np.float64) for polygon in segmentation or ()]
    found = [polygon for polygon in found if len(polygons.check_points(polygon)) > 2]
    return found or {"size": [height, width], "counts": [height * width]}
