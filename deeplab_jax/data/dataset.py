"""What a data set is to the rest of the package: random access to examples, and class names."""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypedDict

import numpy as np

from deeplab_jax.data.labels import LabelSet


class Example(TypedDict):
    """One image with its labels.

    Fields:
      image: uint8 `[height, width, channels]`, RGB order, 0..255.
      label: uint8 `[height, width]`, class ids; `labels.IGNORE` where a pixel does not count.
      name: what to call the example in an error or a picture: a file name, an id.
    """

    image: np.ndarray
    label: np.ndarray
    name: str


class Source(Protocol):
    """Random access to examples. Must pickle: worker processes read from copies of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split of a data set.

    Attributes:
      source: its examples.
      labels: names and colours of its classes.
      num_channels: of its images.
    """

    source: Source
    labels: LabelSet
    num_channels: int = 3
