"""PASCAL VOC 2012 segmentation, with SBD's extra labels as the split trainaug.

| split | images | VOC's own labels | SBD's |
|---|---|---|---|
| train | VOC train | 1464 | |
| val | VOC val | 1449 | |
| trainval | both | 2913 | |
| trainaug | (VOC train + SBD train + SBD val) - VOC val | 1464 | 9118 |

Where an image has both labels, VOC's is used. SBD's have no ignored borders. Sources: Everingham
et al. 2010 (VOC), Hariharan et al. 2011 (SBD), Chen et al. 2017 section 4 (trainaug: 10 582).

A TFDS builder writes each image once, as it is stored, to ArrayRecord files below `TFDS_DATA_DIR`
(default `~/tensorflow_datasets`): to `voc_segmentation/` from the official archives, which are
downloaded, and to `voc_roots/KEY/voc_segmentation/` from a user's root. KEY is a hash of the names,
sizes and modification times of the root's files: a changed root is prepared again, and nothing is
written to the root. All files are checked before the first is written.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset, Example, Pair
from deeplab_jax.data.datasets import archives, records
from deeplab_jax.data.io import images, lists, masks
from deeplab_jax.utils.errors import UserError, raise_problems
from deeplab_jax.utils.files import lock_folder
from deeplab_jax.utils.paths import expand_home

VOC_ARCHIVE = archives.Archive(
    file_name="VOCtrainval_11-May-2012.tar",
    urls=(
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "http://pjreddie.com/media/files/VOCtrainval_11-May-2012.tar",
    ),
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    num_bytes=1_999_639_040,
    folder="VOCdevkit/VOC2012",
    marker="ImageSets/Segmentation/train.txt",
)
SBD_ARCHIVE = archives.Archive(
    file_name="benchmark.tgz",
    urls=(
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
        "benchmark.tgz",
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
        "benchmark.tgz",
    ),
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    num_bytes=1_419_539_633,
    folder="benchmark_RELEASE/dataset",
    marker="train.txt",
)
SERVER = "http://host.robots.ox.ac.uk:8080/"
_NAME = "voc_segmentation"  # of TFDS's folder
_LISTS = "ImageSets/Segmentation"

# The folders that each separately prepared part needs of each archive.
_PARTS: Mapping[str, Mapping[archives.Archive, tuple[str, ...]]] = {
    "voc2012": {VOC_ARCHIVE: (_LISTS, "JPEGImages", "SegmentationClass")},
    "sbd": {VOC_ARCHIVE: (_LISTS,), SBD_ARCHIVE: (".", "img", "cls")},
}
_TITLES = {"voc2012": "VOC 2012", "sbd": "SBD"}
# The parts of each split, with the TFDS split of the part.
SPLITS = {
    "train": (("voc2012", "train"),),
    "val": (("voc2012", "val"),),
    "trainval": (("voc2012", "train+val"),),
    "trainaug": (("voc2012", "train"), ("sbd", "train")),
}


def load(config: DataConfig, split: str) -> Dataset:
    """Loads train, val, trainval or trainaug, in the order of VOC's list, then of SBD's.

    The first call prepares the split; the module says where and how. `config.root` is empty, for
    the official archives; or a folder that holds `VOCdevkit/` and, for trainaug,
    `benchmark_RELEASE/`, or the archives as published instead, and then nothing is downloaded.

    Raises:
      UserError: files are missing or, at the first call, unusable; the message lists all problems.
    """
    if split == "test":
        raise UserError(
            "VOC's test images have no labels to train or evaluate on; `deeplab-jax submit` "
            "writes what the test server scores"
        )
    labels.check_ignore_label("VOC", config.ignore_label)
    found = {}
    if config.root:  # missing files are reported before any part is prepared
        hint = "Leave config.data.root empty to download the archives. Only trainaug needs SBD."
        needed = dict.fromkeys(archive for part, _ in SPLITS[split] for archive in _PARTS[part])
        found = archives.find_archives(needed, config.root, hint)
    folders = [(_prepare(part, config.root, found), name) for part, name in SPLITS[split]]
    return Dataset(records.RecordSource(folders), labels.VOC)


def load_test(config: DataConfig) -> Dataset:
    """Loads the test images, below a root that holds `VOCdevkit/`; their labels are all ignored.

    Raises:
      UserError: the list of images, or an image in it, is missing.
    """
    folder = expand_home(config.root) / VOC_ARCHIVE.folder
    path = folder / _LISTS / "test.txt"
    if not config.root or not path.is_file():
        raise UserError(
            f"config.data.root (--root) is {config.root!r}, but must be a folder that holds "
            f"{VOC_ARCHIVE.folder}/{_LISTS}/test.txt, unpacked from VOC2012test.tar, which "
            f"{SERVER} provides after a registration"
        )
    files = [(name, folder / f"JPEGImages/{name}.jpg") for name in read_list(path)]
    missing = [str(image) for _, image in files if not image.is_file()]
    raise_problems(f"{path} names images that are not there", missing)
    return Dataset(_TestSource(files), labels.VOC)


class _TestSource:
    """Images, each with its name, whose labels only VOC's server has."""

    def __init__(self, files: Sequence[tuple[str, pathlib.Path]]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        name, path = self._files[index]
        image = images.read_image(path)
        label = np.full(image.shape[:2], labels.IGNORE, np.uint8)
        return {"image": image, "label": label, "name": name}


def _prepare(part: str, root: str, found: Mapping[archives.Archive, pathlib.Path]) -> pathlib.Path:
    """Prepares a part, from archives found in a root or else downloaded; returns TFDS's folder."""
    needed, files = _PARTS[part], None
    if root:
        files = [
            (str(path.relative_to(found[archive].parent)), path)
            for archive in needed
            for path in _list_files(archive, found[archive])
        ]

    def list_records(scratch: pathlib.Path) -> dict[str, list[records.Record]]:
        local = found
        if not root:
            downloads = records.data_dir() / "downloads" / _NAME
            with lock_folder(downloads):
                local = {archive: archives.download(archive, downloads) for archive in needed}
        folders = {
            archive: archives.unpack(archive, local[archive], names, scratch)
            for archive, names in needed.items()
        }
        read_label = functools.partial(masks.read_label, labels=labels.VOC)
        return {
            split: [
                records.Record(
                    pair.name, pair.image.read_bytes, functools.partial(read_label, pair)
                )
                for pair in pairs
            ]
            for split, pairs in _list_pairs(part, folders).items()
        }

    source = root or " and ".join(archive.urls[0] for archive in needed)
    return records.prepare(_NAME, part, _TITLES[part], source, files, list_records)


def _list_files(archive: archives.Archive, path: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files that are read from an archive."""
    if path.is_file():
        return [path]
    is_voc = archive is VOC_ARCHIVE
    splits = _voc_pairs(path) if is_voc else {"": _sbd_pairs(path)}
    folder = path / _LISTS if is_voc else path
    pairs = [
        file for split in splits.values() for pair in split for file in (pair.image, pair.mask)
    ]
    return [folder / "train.txt", folder / "val.txt", *pairs]


def _list_pairs(
    part: str, folders: Mapping[archives.Archive, pathlib.Path]
) -> dict[str, list[Pair]]:
    """Returns the pairs of each TFDS split of a part."""
    voc = _voc_pairs(folders[VOC_ARCHIVE])
    if part == "voc2012":
        return voc
    own = {pair.name for split in voc.values() for pair in split}
    added = [pair for pair in _sbd_pairs(folders[SBD_ARCHIVE]) if pair.name not in own]
    if not added:
        raise UserError(f"{folders[SBD_ARCHIVE]}: SBD's lists name no image that VOC's do not")
    return {"train": added}


def _voc_pairs(devkit: pathlib.Path) -> dict[str, list[Pair]]:
    paths = {split: devkit / _LISTS / f"{split}.txt" for split in ("train", "val")}
    names = {split: read_list(path) for split, path in paths.items()}
    both = sorted(set(names["train"]) & set(names["val"]))
    if both:
        raise UserError(
            f"{paths['train']} and {paths['val']} share {len(both)} images, as {both[0]}: "
            "training images cannot be used to evaluate. Remove them from one of the lists."
        )
    return {
        split: [
            Pair(
                name,
                devkit / f"JPEGImages/{name}.jpg",
                devkit / f"SegmentationClass/{name}.png",
                paths[split],
            )
            for name in names[split]
        ]
        for split in paths
    }


def _sbd_pairs(dataset: pathlib.Path) -> list[Pair]:
    pairs = {
        name: Pair(name, dataset / f"img/{name}.jpg", dataset / f"cls/{name}.mat", path)
        for path in (dataset / "train.txt", dataset / "val.txt")
        for name in read_list(path)
    }
    return list(pairs.values())


def read_list(path: pathlib.Path) -> list[str]:
    """Reads the names in a list of images, each once. Raises UserError if there are none."""
    names = lists.read_text(path, "surrogateescape").split()
    if not names:
        raise UserError(f"{path}: names no image, expected one a line, as in 2007_000032")
    if {"-1", "0", "1"} & set(names):
        raise UserError(
            f"{path}: has a second column, as VOC's lists of the images of a class have; expected "
            f"one name a line, as in {names[0]}"
        )
    return list(dict.fromkeys(names))
