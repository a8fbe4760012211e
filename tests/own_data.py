"""Writes a small data set of images and masks, and keeps the expected examples."""

import numpy as np
from PIL import Image

from deeplab_jax import data
from deeplab_jax.config import DataConfig, FolderConfig
from deeplab_jax.data.dataset import read_example
from deeplab_jax.data.labels import IGNORE

NAMES = ("sky", "traffic light", "car")
COLORS = ((10, 20, 30), (250, 170, 30), (64, 0, 128))


class Maker:
    """Writes a data set, and remembers what its examples must be."""

    def __init__(self, root):
        self.root = root
        self.rng = np.random.default_rng(0)
        self.images: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}

    def pair(
        self, name, *, folder="", mask_name="{name}", ignore=255, shape=(7, 9), encoding="ids"
    ):
        image = self.rng.integers(0, 256, (*shape, 3), np.uint8)
        label = self.rng.integers(0, 3, shape).astype(np.uint8)
        label[0, :3] = (0, 1, 2)
        label[1, 1] = IGNORE
        self.save(self.root / "images" / folder / f"{name}.png", image)
        mask = np.where(label == IGNORE, ignore, label).astype(np.uint8)
        path = self.root / "masks" / folder / f"{mask_name.format(name=name)}.png"
        if encoding == "palette":
            picture = Image.fromarray(mask).convert("P")
            picture.putpalette(self.rng.integers(0, 256, 768, np.uint8).tobytes())
            picture.putdata(mask.ravel().tolist())
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        elif encoding == "colors":
            table = np.zeros((256, 3), np.uint8)
            table[:3], table[255] = COLORS, (224, 224, 192)
            self.save(path, table[label])
        else:
            self.save(path, mask)
        self.images[name], self.labels[name] = image, label

    def save(self, path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    def text(self, name, *lines):
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text("\n".join(lines) + "\n")

    def config(self, *, ignore_label=255, **folder):
        return DataConfig(
            name="folder",
            root=str(self.root),
            ignore_label=ignore_label,
            folder=FolderConfig(**folder),
        )

    def load(self, split="train", **settings):
        return data.load(self.config(**settings), split)

    def expect(self, dataset, names):
        """The examples of a data set are those that were written under the names."""
        found = [read_example(dataset, index) for index in range(len(dataset.source))]
        assert [example["name"] for example in found] == list(names)
        for example, name in zip(found, names, strict=True):
            key = name.rpartition("/")[2]
            np.testing.assert_array_equal(example["image"], self.images[key], err_msg=name)
            np.testing.assert_array_equal(example["label"], self.labels[key], err_msg=name)
