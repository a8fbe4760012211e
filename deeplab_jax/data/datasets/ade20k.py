"""ADE20K as in the scene parsing challenge of 2016: 20 210 and 2000 images, 150 classes.

`data.root` holds `ADEChallengeData2016/`, as `ADEChallengeData2016.zip` unpacks. A mask's id 0 is
"other", which does not count; 1 to 150 are the classes, whose names are in `objectInfo150.txt`.
Source: Zhou et al. 2017.
"""

from __future__ import annotations

import pathlib
import re

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.datasets import raw as published
from deeplab_jax.data.io import reading
from deeplab_jax.utils.errors import UserError

_FOLDER = "ADEChallengeData2016"
LAYOUT = published.Layout(
    title="ADE20K",
    images={"train": f"{_FOLDER}/images/training", "val": f"{_FOLDER}/images/validation"},
    masks={"train": f"{_FOLDER}/annotations/training", "val": f"{_FOLDER}/annotations/validation"},
    image_end=".jpg",
    mask_end=".png",
    archives=("ADEChallengeData2016.zip",),
    home="http://sceneparsing.csail.mit.edu",
)
SPLITS = {"train": ("train",), "val": ("val",), "trainval": ("train", "val")}

NUM_CLASSES = 150
CLASS_OF_ID = {0: labels.IGNORE} | {index + 1: index for index in range(NUM_CLASSES)}


def load(config: DataConfig, split: str) -> Dataset:
    """A split of ADE20K, in the order of names; trainval has train before val.

    Args:
      config: its `root` is the folder in which the archive was unpacked.
      split: train, val or trainval.

    Raises:
      UserError: files are missing or damaged; see `published.load`.
    """
    root = published.root_of(LAYOUT, config)
    names = _read_names(root / _FOLDER / "objectInfo150.txt")
    return published.load(LAYOUT, config, SPLITS[split], CLASS_OF_ID, labels.named(*names))


def _read_names(path: pathlib.Path) -> list[str]:
    """The first name of each class, of the last column of a table with a line of headings."""
    lines = reading.read_bytes(path).decode(errors="replace").splitlines()[1:]
    names = [re.split("[,;]", line.split("\t")[-1])[0].strip() for line in lines if line.strip()]
    if len(names) != NUM_CLASSES or not all(names):
        raise UserError(
            f"{path}: names {len(names)} classes, expected a line of headings and {NUM_CLASSES} "
            f"lines that end in a tab and a name. Replace the file by that of {LAYOUT.archives[0]}."
        )
    return names
