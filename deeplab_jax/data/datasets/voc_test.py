"""The test images of VOC 2012. Only VOC's evaluation server has their labels."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset, Example
from deeplab_jax.data.datasets import voc
from deeplab_jax.data.io import images
from deeplab_jax.utils.errors import UserError, raise_problems
from deeplab_jax.utils.paths import expand_home

SERVER = "http://host.robots.ox.ac.uk:8080/"
_LIST = "ImageSets/Segmentation/test.txt"


def load(config: DataConfig) -> Dataset:
    """Loads the test split; every pixel of its labels is `labels.IGNORE`.

    Args:
      config: its `root` is a folder that holds `VOCdevkit/` with the unpacked test images.

    Raises:
      UserError: the list of images, or an image in it, is missing.
    """
    folder = expand_home(config.root) / voc.VOC_ARCHIVE.folder
    if not config.root or not (folder / _LIST).is_file():
        missing = f"{folder / _LIST} is missing" if config.root else "there is no root"
        raise UserError(
            f"{missing}: VOC's test images are not downloaded, since {SERVER} requires a "
            "registration. Unpack its VOC2012test.tar in a folder, so that it holds "
            f"{voc.VOC_ARCHIVE.folder}/{_LIST}, and give that folder: --root, config.data.root"
        )
    paths = {name: folder / f"JPEGImages/{name}.jpg" for name in voc.read_list(folder / _LIST)}
    raise_problems(
        f"{folder / _LIST} names images that are not there",
        [str(path) for path in paths.values() if not path.is_file()],
    )
    return Dataset(_ImageSource(tuple(paths.items())), labels.VOC)


@dataclasses.dataclass(frozen=True)
class _ImageSource:
    """Examples without labels, from the name and path of each image."""

    files: tuple[tuple[str, pathlib.Path], ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        name, path = self.files[index]
        image = images.read_image(path)
        label = np.full(image.shape[:2], labels.IGNORE, np.uint8)
        return {"image": image, "label": label, "name": name}
