"""VOC 2012's test images, read where they lie. Their labels are known to the test server alone."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.datasets import voc
from deeplab_jax.data.io import reading
from deeplab_jax.utils.errors import UserError

SERVER = "http://host.robots.ox.ac.uk:8080/"
_LIST = "ImageSets/Segmentation/test.txt"


def load(config: DataConfig) -> Dataset:
    """The test split; every pixel of its labels is `labels.IGNORE`.

    Args:
      config: its `root` is a folder that holds `VOCdevkit/` with the test images unpacked.

    Raises:
      UserError: they are not there, or not all of them. Reading an example raises one for a file
        that is no image.
    """
    folder = pathlib.Path(config.root).expanduser() / voc.VOC_ARCHIVE.folder
    if not config.root or not (folder / _LIST).is_file():
        lacking = f"{folder / _LIST} is missing" if config.root else "there is no root"
        raise UserError(
            f"{lacking}: VOC's test images are not downloaded, as {SERVER} gives them to who "
            "registers there. Unpack its VOC2012test.tar in a folder, so that it holds "
            f"{voc.VOC_ARCHIVE.folder}/{_LIST}, and give that folder: --root, config.data.root"
        )
    paths = {name: folder / f"JPEGImages/{name}.jpg" for name in voc.read_list(folder / _LIST)}
    reading.raise_together(
        f"{folder / _LIST} names images that are not there",
        (f"{path}" for path in paths.values() if not path.is_file()),
    )
    return Dataset(_Images(tuple(paths.items())), labels.VOC)


@dataclasses.dataclass(frozen=True)
class _Images:
    """Examples without labels.

    Attributes:
      files: name and path of each.
    """

    files: tuple[tuple[str, pathlib.Path], ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        name, path = self.files[index]
        image = reading.read_image(path)
        return Example(
            image=image, label=np.full(image.shape[:2], labels.IGNORE, np.uint8), name=name
        )
