"""COCO 2017 reduced to VOC's classes, for pretraining as in the paper's section 4.3.

The instances of an image are drawn into one label by the rules of torchvision's
`references/segmentation`, so that scores on val are comparable with torchvision's published ones:

- the 20 categories that VOC has keep their class; instances of the other 60 are background;
- a pixel of more than one instance, even of one class, is ignored (255);
- a crowd region is an instance like others.

| split | images of COCO 2017 |
|---|---|
| train | those of train whose regions of VOC's classes have more than 1000 pixels together |
| val | all of val |

The rule of train is torchvision's reading of the paper's "images that have annotation regions
larger than 1000 pixels and contain the classes defined in PASCAL VOC 2012", which left about 60 000
of trainval_minus_minival.

Nothing is downloaded. A TFDS builder prepares each split once, in ArrayRecord files below
`TFDS_DATA_DIR` (default `~/tensorflow_datasets`) at `coco_roots/KEY/coco_segmentation/`. KEY is a
hash of the names, sizes and modification times of the split's archives or, if they are unpacked, of
its annotation file and image folder. All files are checked before the first is written.
"""

from __future__ import annotations

import functools
import json
import pathlib
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.datasets import archives, records
from deeplab_jax.data.io import coco_json
from deeplab_jax.data.io.images import decode_image
from deeplab_jax.utils.errors import UserError

MIN_AREA = 1000  # an image of train has more pixels of VOC's classes than this

# COCO's category id of each class of VOC, in the order of `labels.VOC`; background has none.
_CATEGORIES = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
CLASS_OF_CATEGORY = {
    category: class_id for class_id, category in enumerate(_CATEGORIES) if class_id > 0
}

_URL = "http://images.cocodataset.org"

_Path = pathlib.Path | zipfile.Path


class Instance(NamedTuple):
    """A region of one of VOC's classes."""

    id: int
    class_id: int  # in `labels.VOC`
    area: float  # number of pixels, according to the annotation
    segmentation: Any  # polygons [x, y, x, y, ...], or a run-length code


class AnnotatedImage(NamedTuple):
    """An image and its instances of VOC's classes, in the order of the annotations."""

    file_name: str
    height: int
    width: int
    instances: list[Instance]


def load(config: DataConfig, split: str) -> Dataset:
    """Loads train or val, in the order of COCO's image ids.

    The first call prepares the split; the module says where and how. `config.root` is a folder that
    holds `annotations/`, and `train2017/` or `val2017/`, or the zip files as published instead.

    Raises:
      UserError: files are missing or, at the first call, unusable; the message lists all problems.
        Or pycocotools, which the first call needs, is not installed.
    """
    labels.check_ignore_label("COCO", config.ignore_label)
    hint = "COCO is not downloaded automatically."
    found = archives.find_archives(_archives(split), config.root, hint)
    # The zip file or, if it is unpacked, the annotations or images.
    paths = [path / each.marker if path.is_dir() else path for each, path in found.items()]
    folder = records.prepare(
        "coco_segmentation",
        split,
        f"COCO {split}",
        config.root,
        [(path.name, path) for path in paths],
        lambda _: {split: _list_records(split, *map(_open, found, paths))},
    )
    return Dataset(records.RecordSource([(folder, split)]), labels.VOC)


def _archives(split: str) -> tuple[archives.Archive, archives.Archive]:
    """Returns the archives of a split's annotations and images."""
    texts, images = "annotations_trainval2017.zip", f"{split}2017.zip"
    marker = f"instances_{split}2017.json"
    return (
        archives.Archive(texts, (f"{_URL}/annotations/{texts}",), "annotations", marker),
        archives.Archive(images, (f"{_URL}/zips/{images}",), f"{split}2017"),
    )


def _list_records(split: str, annotations: _Path, images: _Path) -> list[records.Record]:
    coco_json.require_pycocotools()
    annotated = read_annotations(annotations)
    if split == "train":
        areas = [sum(each.area for each in image.instances) for image in annotated]
        annotated = [each for each, area in zip(annotated, areas, strict=True) if area > MIN_AREA]
    if not annotated:
        raise UserError(f"{annotations}: has no image with VOC's classes")
    return [
        records.Record(
            pathlib.PurePosixPath(image.file_name).stem,
            functools.partial(_read, images / image.file_name),
            functools.partial(_read_label, image, images / image.file_name, annotations),
        )
        for image in annotated
    ]


def _read_label(image: AnnotatedImage, path: _Path, annotations: _Path) -> UInt8[np.ndarray, "h w"]:
    if not path.is_file():
        raise UserError(f"{path}: is missing, but {annotations} names it.")
    height, width = decode_image(_read(path), str(path)).shape[:2]
    if (height, width) != (image.height, image.width):
        raise UserError(
            f"{path}: is {width} x {height} pixels (width x height), but {annotations} says "
            f"{image.width} x {image.height}."
        )
    return draw_label(image)


def read_annotations(path: _Path) -> list[AnnotatedImage]:
    """Reads the images of one of COCO's `instances_*.json`, in the order of their ids.

    Raises:
      UserError: the file cannot be read, or is not one of COCO's.
    """
    try:
        content = json.loads(_read(path))
        images = {
            one["id"]: AnnotatedImage(one["file_name"], one["height"], one["width"], [])
            for one in sorted(content["images"], key=lambda one: one["id"])
        }
        for one in content["annotations"]:
            class_id = CLASS_OF_CATEGORY.get(one["category_id"])
            if class_id is not None:
                instance = Instance(one["id"], class_id, one["area"], one["segmentation"])
                images[one["image_id"]].instances.append(instance)
        return list(images.values())
    except ValueError as error:
        raise UserError(f"{path}: truncated, or not JSON ({error}). Replace the file.") from None
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is not a file of COCO's instances ({type(error).__name__}: {error}). "
            "Expected the file in annotations_trainval2017.zip."
        ) from None


def draw_label(image: AnnotatedImage) -> UInt8[np.ndarray, "h w"]:
    """Draws an image's label: VOC's class ids, and `labels.IGNORE` where instances overlap.

    Raises:
      UserError: a segmentation cannot be decoded.
    """
    label = np.zeros((image.height, image.width), np.uint8)
    covered, overlap = np.zeros(label.shape, bool), np.zeros(label.shape, bool)
    for instance in image.instances:
        try:
            inside = coco_json.decode(instance.segmentation, image.height, image.width)
        except Exception as error:  # pycocotools raises various errors
            raise UserError(
                f"{image.file_name}: the segmentation of annotation {instance.id} cannot be "
                f"decoded ({error})."
            ) from None
        label[inside] = instance.class_id
        overlap |= covered & inside
        covered |= inside
    label[overlap] = labels.IGNORE
    return label


def _open(archive: archives.Archive, path: pathlib.Path) -> _Path:
    """Returns the path of the annotations or images, on disk or in a zip file."""
    if path.suffix != ".zip":
        return path
    try:
        return zipfile.Path(zipfile.ZipFile(path), f"{archive.folder}/{archive.marker}".rstrip("/"))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: the archive is damaged or truncated ({error}). Download it again from "
            f"{archive.urls[0]}"
        ) from None


def _read(path: _Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
