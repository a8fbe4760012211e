"""ADE20K as in the scene parsing challenge of 2016: 20 210 and 2000 images, 150 classes.

`config.data.root` holds `ADEChallengeData2016/`, unpacked from `ADEChallengeData2016.zip`. In a
mask, the id 0 is "other", which is ignored; 1 to 150 are the classes, whose names are in
`objectInfo150.txt`. Source: Zhou et al. 2017.
"""

from __future__ import annotations

import pathlib
import re

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.datasets import raw
from deeplab_jax.data.datasets.archives import Archive
from deeplab_jax.data.io import images
from deeplab_jax.utils.errors import UserError

_NUM_CLASSES = 150
_FOLDER = "ADEChallengeData2016"


def _read_labels(root: pathlib.Path) -> labels.LabelSet:
    """Reads the first name of each class from the last column of a table with a header line."""
    path = root / _FOLDER / "objectInfo150.txt"
    lines = images.read_bytes(path).decode(errors="replace").splitlines()[1:]
    names = [re.split("[,;]", line.split("\t")[-1])[0].strip() for line in lines if line.strip()]
    if len(names) != _NUM_CLASSES or not all(names):
        raise UserError(
            f"{path}: names {len(names)} classes, expected a header line and {_NUM_CLASSES} lines "
            f"that end in a tab and a name. Replace the file by that of {_FOLDER}.zip."
        )
    return labels.named(*names)


_ADE20K = raw.RawDataset(
    title="ADE20K",
    images={"train": f"{_FOLDER}/images/training", "val": f"{_FOLDER}/images/validation"},
    masks={"train": f"{_FOLDER}/annotations/training", "val": f"{_FOLDER}/annotations/validation"},
    image_suffix=".jpg",
    mask_suffix=".png",
    archives=(Archive(f"{_FOLDER}.zip", ("http://sceneparsing.csail.mit.edu",), _FOLDER),),
    class_of_id={0: labels.IGNORE} | {index + 1: index for index in range(_NUM_CLASSES)},
    read_labels=_read_labels,
)


def load(config: DataConfig, split: str) -> Dataset:
    """Loads the split train, val or trainval; see `raw.load`."""
    return raw.load(_ADE20K, config, split)
