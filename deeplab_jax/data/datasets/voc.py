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
from collections.abc import Mapping

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset, Pair
from deeplab_jax.data.datasets import archives, records
from deeplab_jax.data.io import lists, masks
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import lock_folder

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
_NAME = "voc_segmentation"  # of TFDS's folder
_VOC_LISTS = "ImageSets/Segmentation"

# The folders that each separately prepared part needs of each archive.
_PARTS: dict[str, dict[archives.Archive, tuple[str, ...]]] = {
    "voc2012": {VOC_ARCHIVE: (_VOC_LISTS, "JPEGImages", "SegmentationClass")},
    "sbd": {VOC_ARCHIVE: (_VOC_LISTS,), SBD_ARCHIVE: (".", "img", "cls")},
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
    """Loads a split of VOC. The first call prepares it; the module says where and how.

    Args:
      config: its `root` is empty, for the official archives; or a folder that holds `VOCdevkit/`
        and, for trainaug, `benchmark_RELEASE/`, or the archives as published instead. With a root,
        nothing is downloaded.
      split: train, val, trainval or trainaug.

    Returns:
      The split, in the order of VOC's list, then of SBD's.

    Raises:
      UserError: files are missing or, at the first call, unusable; the message lists all problems.
    """
    if split == "test":
        raise UserError(
            "VOC's test images have no labels to train or evaluate on; `deeplab-jax submit` "
            "writes what the test server scores"
        )
    labels.check_ignore_label("VOC", config.ignore_label)
    parts = SPLITS[split]
    # Missing files are reported before any part is prepared.
    found = {}
    if config.root:
        hint = "Leave config.data.root empty to download the archives."
        if split == "trainaug":
            hint += " The splits train, val and trainval do not need SBD."
        needed = dict.fromkeys(archive for part, _ in parts for archive in _PARTS[part])
        found = archives.find_archives(needed, config.root, hint)
    folders = [(_prepare(part, config.root, found), tfds_split) for part, tfds_split in parts]
    return Dataset(records.RecordSource(folders), labels.VOC)


def _prepare(
    part: str, root: str, found: Mapping[archives.Archive, archives.LocalArchive]
) -> pathlib.Path:
    """Prepares a part and returns TFDS's folder of it.

    Args:
      part: a key of `_PARTS`.
      root: the user's root; empty to download the archives.
      found: the archives in the root.
    """
    data_dir = records.data_dir()
    downloads = data_dir / "downloads" / _NAME
    needed = _PARTS[part]
    source = root or " and ".join(archive.urls[0] for archive in needed)
    if root:
        files = [
            (str(path.relative_to(found[archive].path.parent)), path)
            for archive in needed
            for path in _list_files(found[archive])
        ]
        data_dir = data_dir / "voc_roots" / records.fingerprint(files)

    def list_records(scratch: pathlib.Path) -> dict[str, list[records.Record]]:
        local = found
        if not root:
            with lock_folder(downloads):
                local = {archive: archives.download(archive, downloads) for archive in needed}
        folders = {
            archive: archives.unpack(local[archive], names, scratch)
            for archive, names in needed.items()
        }
        return {
            split: [
                records.Record(
                    pair.name,
                    pair.image.read_bytes,
                    functools.partial(masks.read_label, pair, labels.VOC),
                )
                for pair in pairs
            ]
            for split, pairs in _list_pairs(part, folders).items()
        }

    return records.prepare(_NAME, part, _TITLES[part], data_dir, source, list_records)


def _list_files(local: archives.LocalArchive) -> list[pathlib.Path]:
    """Lists the files that are read from an archive."""
    if not local.is_unpacked:
        return [local.path]
    if local.archive is VOC_ARCHIVE:
        folder = local.path / _VOC_LISTS
        pairs = [pair for split in _voc_pairs(local.path).values() for pair in split]
    else:
        folder = local.path
        pairs = _sbd_pairs(local.path)
    lists = [folder / "train.txt", folder / "val.txt"]
    return [*lists, *(path for pair in pairs for path in (pair.image, pair.mask))]


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
    lists = {split: devkit / _VOC_LISTS / f"{split}.txt" for split in ("train", "val")}
    names = {split: read_list(path) for split, path in lists.items()}
    both = sorted(set(names["train"]) & set(names["val"]))
    if both:
        raise UserError(
            f"{lists['train']} and {lists['val']} share {len(both)} images, as {both[0]}: "
            "training images cannot be used to evaluate. Remove them from one of the lists."
        )
    images, masks = devkit / "JPEGImages", devkit / "SegmentationClass"
    return {
        split: [
            Pair(name, images / f"{name}.jpg", masks / f"{name}.png", lists[split])
            for name in names[split]
        ]
        for split in lists
    }


def _sbd_pairs(dataset: pathlib.Path) -> list[Pair]:
    images, masks = dataset / "img", dataset / "cls"
    pairs = {
        name: Pair(name, images / f"{name}.jpg", masks / f"{name}.mat", path)
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
