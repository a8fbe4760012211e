"""COCO 2017 reduced to VOC's classes, for pretraining as in the paper's section 4.3.

Instances are drawn into one label an image, as torchvision's `references/segmentation` does it,
with whose published scores those on val can be compared:

- the 20 categories that VOC has keep their class; what belongs to the other 60 is background;
- a pixel of more than one instance, be they of one class, is ignored (255);
- a crowd region is an instance like others: for a class, it does not matter how many there are.

| split | images of COCO 2017 |
|---|---|
| train | those of train whose regions of VOC's classes have more than 1000 pixels together |
| val | all of val |

The rule of train is torchvision's reading of the paper's "images that have annotation regions
larger than 1000 pixels and contain the classes defined in PASCAL VOC 2012", which left about 60 000
of trainval_minus_minival.

Nothing is downloaded. Each split is prepared once by a TFDS builder in ArrayRecord files, below
`TFDS_DATA_DIR` (else `~/tensorflow_datasets`) at `coco_roots/KEY/coco_segmentation/`. KEY is a hash
of the names, sizes and modification times of the split's archives or, if they are unpacked, of its
annotations and the folder of its images. All files are checked before the first is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, UInt8

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.datasets import records as prepared
from deeplab_jax.data.io import reading
from deeplab_jax.utils.errors import UserError

SPLITS = ("train", "val")
MIN_AREA = 1000  # pixels of VOC's classes that an image of train has more than

# COCO's category id of each class of VOC, in the order of `labels.VOC`.
_CATEGORIES = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
CLASS_OF_CATEGORY = {
    category: index for index, category in enumerate(_CATEGORIES) if index > 0
}  # background is no category

_URLS = {
    "annotations_trainval2017.zip": (
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
    ),
    "train2017.zip": "http://images.cocodataset.org/zips/train2017.zip",
    "val2017.zip": "http://images.cocodataset.org/zips/val2017.zip",
}

_Path = pathlib.Path | zipfile.Path


@dataclasses.dataclass(frozen=True)
class Instance:
    """A region of one of VOC's classes.

    Attributes:
      id: of the annotation.
      class_id: in `labels.VOC`.
      area: pixels, as the annotation says.
      segmentation: polygons, each `[x, y, x, y, ...]`; or a run-length code, a dict of its size and
        counts.
    """

    id: int
    class_id: int
    area: float
    segmentation: Any


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image and its instances of VOC's classes, in the order of the annotations."""

    file_name: str
    height: int
    width: int
    instances: tuple[Instance, ...]


def load(config: DataConfig, split: str) -> Dataset:
    """A split of COCO, prepared at the first call; see the module for where and how.

    Args:
      config: its `root` is a folder that holds `annotations/`, and `train2017/` or `val2017/`, or
        in their place the zip files as published.
      split: train or val.

    Returns:
      The split, in the order of COCO's image ids.

    Raises:
      UserError: data is missing, or is found unusable when it is prepared; lists all problems.
        Or it is not prepared yet, and pycocotools is not installed.
    """
    if split not in SPLITS:
        raise UserError(f"COCO has the splits {', '.join(SPLITS)}; got {split!r}")
    prepared.check_ignore_label("COCO", config)
    places = _find(config.root, split)
    data_dir = prepared.data_dir() / "coco_roots" / _key(places)
    folder = data_dir / CocoSegmentation.name / split
    final = prepared.once(
        folder / str(CocoSegmentation.VERSION), lambda: _prepare(places, split, data_dir)
    )
    return Dataset(prepared.RecordSource([(final, split)]), labels.VOC)


class CocoSegmentation(tfds.core.GeneratorBasedBuilder):
    """Writes a split of COCO; the builder's config names it.

    Args:
      annotations: the file of instances.
      images: the folder of the split's images.
      **kwargs: those of the base class.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SPLITS]  # noqa: RUF012

    def __init__(self, *, annotations: _Path, images: _Path, **kwargs: Any) -> None:
        super().__init__(file_format="array_record", **kwargs)
        self._annotations = annotations
        self._images = images

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="COCO 2017 with the classes of PASCAL VOC.",
            features=prepared.features(),
            disable_shuffling=True,  # the order of the ids is kept
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the archives are here already
        split = self.builder_config.name
        pictures = read_annotations(self._annotations)
        if split == "train":
            pictures = [picture for picture in pictures if is_trained_on(picture)]
        if not pictures:
            raise UserError(f"{self._annotations}: has no image with VOC's classes")
        masks = reading.check_all(self._encoded_mask, pictures, f"Checking COCO {split}")
        return {split: self._generate_examples(pictures, masks)}

    def _encoded_mask(self, picture: Picture) -> bytes:
        path = self._images / picture.file_name
        if not path.is_file():
            raise UserError(f"{path}: is missing, yet {self._annotations} names it.")
        stored = reading.check_image_data(_read(path), str(path))
        if stored != (picture.height, picture.width):
            raise UserError(
                f"{path}: is {stored[1]} x {stored[0]} pixels (width x height), but "
                f"{self._annotations} says {picture.width} x {picture.height}."
            )
        return reading.encode_label(draw(picture))

    def _generate_examples(
        self, pictures: Sequence[Picture], masks: Sequence[bytes]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, picture in enumerate(reading.watch(pictures, "Writing COCO")):
            image = _read(self._images / picture.file_name)
            name = pathlib.PurePosixPath(picture.file_name).stem
            yield index, {"image": image, "label": masks[index], "name": name}


def is_trained_on(picture: Picture) -> bool:
    """Whether an image belongs to the split train; see the module."""
    return sum(instance.area for instance in picture.instances) > MIN_AREA


def read_annotations(path: _Path) -> list[Picture]:
    """The images of an `instances_*.json` of COCO in the order of their ids.

    Raises:
      UserError: the file cannot be read, or is none of COCO's.
    """
    try:
        content = json.loads(_read(path))
        instances: dict[int, list[Instance]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            class_id = CLASS_OF_CATEGORY.get(annotation["category_id"])
            if class_id is not None:
                instances[annotation["image_id"]].append(
                    Instance(
                        annotation["id"], class_id, annotation["area"], annotation["segmentation"]
                    )
                )
        return [
            Picture(
                image["file_name"], image["height"], image["width"], tuple(instances[image["id"]])
            )
            for image in sorted(content["images"], key=lambda image: image["id"])
        ]
    except ValueError as error:
        raise UserError(f"{path}: truncated, or no JSON ({error}). Replace the file.") from None
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no file of COCO's instances ({type(error).__name__}: {error}). Expected "
            "that of annotations_trainval2017.zip."
        ) from None


def draw(picture: Picture) -> UInt8[np.ndarray, "h w"]:
    """The label of an image: VOC's class ids, and `labels.IGNORE` where instances overlap.

    Raises:
      UserError: a segmentation cannot be decoded.
    """
    label = np.zeros((picture.height, picture.width), np.uint8)
    covered, overlap = np.zeros(label.shape, bool), np.zeros(label.shape, bool)
    for instance in picture.instances:
        inside = _decode(instance, picture)
        label[inside] = instance.class_id
        overlap |= covered & inside
        covered |= inside
    label[overlap] = labels.IGNORE
    return label


def _decode(instance: Instance, picture: Picture) -> Bool[np.ndarray, "h w"]:
    """The pixels of an instance, by COCO's own rule for those on a polygon's edge."""
    from pycocotools import mask as coco_mask

    size = [picture.height, picture.width]
    segmentation = instance.segmentation
    try:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != size:
                raise ValueError(f"its size is {segmentation['size']}, its image's {size}")
            packed = isinstance(segmentation["counts"], str | bytes)
            code = segmentation if packed else coco_mask.frPyObjects(segmentation, *size)
        else:
            code = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
        return coco_mask.decode(code).astype(bool)
    except Exception as error:  # pycocotools raises what its parser stumbles on
        raise UserError(
            f"{picture.file_name}: the segmentation of annotation {instance.id} cannot be decoded "
            f"({error})."
        ) from None


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a source of COCO is: unpacked, or at a path inside a zip file."""

    on_disk: pathlib.Path
    inside: str = ""

    def open(self) -> _Path:
        if not self.inside:
            return self.on_disk
        try:
            return zipfile.Path(zipfile.ZipFile(self.on_disk), self.inside)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{self.on_disk}: the archive is damaged or truncated ({error}). Download it again "
                f"from {_URLS[self.on_disk.name]}"
            ) from None


def _find(root: str, split: str) -> list[_Place]:
    """A split's file of annotations and folder of images, unpacked or, failing that, in zips.

    Raises:
      UserError: the root does not hold them.
    """
    if not root:
        raise UserError(
            "config.data.root is empty: COCO is not downloaded by itself. Lay these, or what is in "
            "them, into a folder, and give it:\n" + "\n".join(_URLS.values())
        )
    folder = pathlib.Path(root).expanduser()
    annotations = f"annotations/instances_{split}2017.json"
    sources = {
        "annotations_trainval2017.zip": annotations,
        f"{split}2017.zip": f"{split}2017",
    }
    places, missing = [], []
    for archive, inside in sources.items():
        if (folder / inside).exists():
            places.append(_Place(folder / inside))
        elif (folder / archive).is_file():
            places.append(_Place(folder / archive, inside))
        else:
            missing.append(f"- {inside}, or {archive} from {_URLS[archive]}")
    if missing:
        state = "does not hold what this split needs" if folder.exists() else "does not exist"
        raise UserError(
            "\n".join([f"config.data.root: {folder} {state}. Looked for", *missing])
            + "\nLay one or the other there."
        )
    return places


def _read(path: _Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None


def _key(places: Sequence[_Place]) -> str:
    """Hash of the names, sizes and modification times of what is on disk."""
    digest = hashlib.sha256()
    for place in places:
        status = place.on_disk.stat()
        # The size of a folder differs between file systems.
        size = status.st_size if place.on_disk.is_file() else 0
        digest.update(f"{place.on_disk.name} {size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _prepare(places: Sequence[_Place], split: str, data_dir: pathlib.Path) -> None:
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(
            "COCO's annotations are decoded with pycocotools, which is not installed: "
            "pip install 'deeplab-jax[coco]'. It is needed once, when the data set is prepared."
        )
    folder = data_dir / CocoSegmentation.name / split
    annotations, images = (place.open() for place in places)
    print(f"Preparing COCO {split} from {images} in {folder}", file=sys.stderr)
    with prepared.scratch(folder) as scratch:
        builder = CocoSegmentation(
            annotations=annotations, images=images, config=split, data_dir=data_dir
        )
        prepared.write(builder, scratch)
