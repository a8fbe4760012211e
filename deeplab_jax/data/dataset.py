"""The interface of a data set: random access to examples, and the classes."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Protocol, TypedDict

import numpy as np
from jaxtyping import Int, UInt8

from deeplab_jax.data.labels import IGNORE, LabelSet
from deeplab_jax.utils.errors import UserError, listed


class Example(TypedDict):
    """One image with its label."""

    image: UInt8[np.ndarray, "h w c"]  # RGB order, 0..255
    label: UInt8[np.ndarray, "h w"]  # class ids; `labels.IGNORE` where a pixel does not count
    name: str  # in errors and pictures: a file name or an id


class Source(Protocol):
    """Random access to examples. Must pickle: each worker process reads from a copy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True, eq=False)
class IndexedSource:
    """The examples of a source at `indices`, which may repeat."""

    source: Source
    indices: Int[np.ndarray, " examples"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split of a data set."""

    source: Source
    labels: LabelSet
    num_channels: int = 3  # of the images
    notes: tuple[str, ...] = ()  # what the reader found by itself; training prints them


@dataclasses.dataclass(frozen=True)
class Pair:
    """The files of one example."""

    name: str
    image: pathlib.Path  # an image file, or a `.npy` file
    # A file of class ids or colours: an image or an array; LabelMe's file of shapes; or the virtual
    # path `annotations.json/ID` of an image of a COCO file.
    mask: pathlib.Path
    listed_in: pathlib.Path  # the file or folder that names the example


def read_example(dataset: Dataset, index: int) -> Example:
    """Reads an example and checks its shapes and class ids.

    Raises:
      UserError: the image and the label differ in size or do not fit the data set.
    """
    example = dataset.source[index]
    image, label, name = example["image"], example["label"], example["name"]
    if image.shape[2:] != (dataset.num_channels,):
        raise UserError(
            f"{name}: the image must be [height, width, {dataset.num_channels}], "
            f"got {list(image.shape)}"
        )
    if label.shape != image.shape[:2]:
        sizes = [" x ".join(map(str, array.shape[1::-1])) for array in (label, image)]
        raise UserError(f"{name}: the label is {sizes[0]} pixels, its image {sizes[1]}")
    check_ids(label, dataset.labels, name)
    return example


def check_ids(ids: np.ndarray, labels: LabelSet, name: str) -> None:
    """Raises UserError if an id is neither a class nor `labels.IGNORE`; `name` names the label."""
    last = labels.num_classes - 1
    unknown = ids[((ids < 0) | (ids > last)) & (ids != IGNORE)]
    if unknown.size:
        counts = zip(*np.unique(unknown, return_counts=True), strict=True)
        ids_found = listed([f"id {value} ({count} pixels)" for value, count in counts])
        raise UserError(
            f"{name}: the label holds {ids_found}; expected a class (0 to {last}) or {IGNORE} "
            "for pixels that do not count"
        )
