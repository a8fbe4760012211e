"""PASCAL VOC 2012 segmentation, with SBD's extra labels as the split trainaug.

| split | images | VOC's own labels | SBD's |
|---|---|---|---|
| train | VOC train | 1464 | |
| val | VOC val | 1449 | |
| trainval | both | 2913 | |
| trainaug | (VOC train + SBD train + SBD val) - VOC val | 1464 | 9118 |

Where an image has both labels, VOC's own wins. SBD's have no ignored borders. Sources: Everingham
et al. 2010 (VOC), Hariharan et al. 2011 (SBD), Chen et al. 2017 section 4 (trainaug: 10 582).

Each image is stored once, as it came, by a TFDS builder in ArrayRecord files, below `TFDS_DATA_DIR`
(else `~/tensorflow_datasets`): at `voc_segmentation/` for the official archives, which are
downloaded, and at `voc_roots/KEY/voc_segmentation/` for a root of the user's. KEY is a hash of the
names, sizes and modification times of the root's files: a changed root is prepared anew, and
nothing is written to the root. All files are checked before the first is written.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from deeplab_jax.config import DataConfig
from deeplab_jax.data import labels
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.datasets import archives
from deeplab_jax.data.datasets import records as prepared
from deeplab_jax.data.io import reading
from deeplab_jax.data.io.reading import Pair
from deeplab_jax.utils.errors import UserError

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
_VOC_LISTS = "ImageSets/Segmentation"

# What each part, prepared by itself, needs of each archive: its folders.
_PARTS: dict[str, dict[archives.Archive, tuple[str, ...]]] = {
    "voc2012": {VOC_ARCHIVE: (_VOC_LISTS, "JPEGImages", "SegmentationClass")},
    "sbd": {VOC_ARCHIVE: (_VOC_LISTS,), SBD_ARCHIVE: (".", "img", "cls")},
}
# The parts of each split, with the TFDS split of the part.
SPLITS = {
    "train": (("voc2012", "train"),),
    "val": (("voc2012", "val"),),
    "trainval": (("voc2012", "train+val"),),
    "trainaug": (("voc2012", "train"), ("sbd", "train")),
}


def load(config: DataConfig, split: str) -> Dataset:
    """A split of VOC, prepared at the first call; see the module for where and how.

    Args:
      config: its `root` is empty, for the official archives; or a folder that holds `VOCdevkit/`
        and, for trainaug, `benchmark_RELEASE/`, or in their place the archives as published. With
        a root, nothing is downloaded.
      split: train, val, trainval or trainaug.

    Returns:
      The split, in the order of VOC's list, then of SBD's.

    Raises:
      UserError: data is missing, or is found unusable when it is prepared; lists all problems.
    """
    if split == "test":
        raise UserError(
            "VOC's test images have no labels to train or evaluate on; `deeplab-jax submit` "
            "writes what the test server scores"
        )
    if split not in SPLITS:
        raise UserError(f"VOC has the splits {', '.join(SPLITS)}; got {split!r}")
    prepared.check_ignore_label("VOC", config)
    parts = SPLITS[split]
    # All that the split needs is looked for before any of it is prepared.
    places = _places([part for part, _ in parts], config.root) if config.root else None
    folders = [(_prepared(part, places), tfds_split) for part, tfds_split in parts]
    return Dataset(prepared.RecordSource(folders), labels.VOC)


class VocSegmentation(tfds.core.GeneratorBasedBuilder):
    """Writes VOC's pairs (config voc2012: train, val) or those that SBD adds (sbd: train).

    Args:
      folders: where each archive that the config needs lies unpacked.
      **kwargs: those of the base class.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in _PARTS]  # noqa: RUF012

    def __init__(self, *, folders: Mapping[archives.Archive, pathlib.Path], **kwargs: Any) -> None:
        super().__init__(file_format="array_record", **kwargs)
        self._folders = folders

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="PASCAL VOC 2012 segmentation, and the images that SBD adds to it.",
            features=prepared.features(),
            disable_shuffling=True,  # the order of the lists is kept
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the archives are here already
        splits = _pairs(self.builder_config.name, self._folders)
        pairs = [pair for split in splits.values() for pair in split]
        masks = dict(
            zip(pairs, reading.check_all(_encoded_mask, pairs, "Checking VOC"), strict=True)
        )
        return {name: self._generate_examples(split, masks) for name, split in splits.items()}

    def _generate_examples(
        self, pairs: Sequence[Pair], masks: Mapping[Pair, bytes]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, pair in enumerate(reading.watch(pairs, "Writing VOC")):
            image = pair.image.read_bytes()
            yield index, {"image": image, "label": masks[pair], "name": pair.name}


def _encoded_mask(pair: Pair) -> bytes:
    label = reading.read_label(pair, labels.VOC.num_classes, labels.IGNORE)
    return reading.encode_label(label)


def _pairs(part: str, folders: Mapping[archives.Archive, pathlib.Path]) -> dict[str, list[Pair]]:
    """The pairs of each TFDS split of a part."""
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
            "what a model is trained on cannot measure it. Take them off one of the lists."
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
    """The names in a list of images, each once; a UserError if it cannot be read or is empty."""
    try:
        names = path.read_text(errors="replace").split()
    except OSError as error:
        raise UserError(
            f"{path}: the list of a split's images cannot be read ({error.strerror})"
        ) from None
    if not names:
        raise UserError(f"{path}: names no image, expected one a line, as in 2007_000032")
    return list(dict.fromkeys(names))


def _places(parts: Sequence[str], root: str) -> dict[archives.Archive, archives.Place]:
    """Where the archives that the parts need are in the user's root.

    Raises:
      UserError: the root does not hold all of them.
    """
    folder = pathlib.Path(root).expanduser()
    needed = dict.fromkeys(archive for part in parts for archive in _PARTS[part])
    found = {archive: archives.find(archive, folder) for archive in needed}
    missing = [archive for archive, place in found.items() if place is None]
    if missing:
        raise UserError(_missing(folder, missing))
    return {archive: place for archive, place in found.items() if place is not None}


def _missing(root: pathlib.Path, missing: Sequence[archives.Archive]) -> str:
    state = "does not hold what this split needs" if root.exists() else "does not exist"
    looked_for = [
        f"- {archive.folder}/{archive.marker}, or {archive.file_name} from {archive.urls[0]}"
        for archive in missing
    ]
    mend = "Lay one or the other there, or leave config.data.root empty to download the archives."
    if VOC_ARCHIVE not in missing:
        mend += " Without SBD there are the splits train, val and trainval, but not trainaug."
    if (root / "VOC2012").is_dir():
        mend += (
            f" This looks like VOCdevkit itself: the root is the folder it is in, {root.parent}."
        )
    return "\n".join([f"config.data.root: {root} {state}. Looked for", *looked_for, mend])


def _prepared(part: str, places: Mapping[archives.Archive, archives.Place] | None) -> pathlib.Path:
    """The folder in which TFDS has a part, prepared if it is not there yet.

    Args:
      part: a key of `_PARTS`.
      places: of its archives; None to download them.
    """
    base = prepared.data_dir()
    here = None if places is None else [places[archive] for archive in _PARTS[part]]
    data_dir = base if here is None else base / "voc_roots" / _key(here)

    def prepare() -> None:
        if here is not None:
            return _prepare(part, here, data_dir)
        downloads = base / "downloads" / VocSegmentation.name
        with prepared.locked(downloads):
            downloaded = [archives.download(archive, downloads) for archive in _PARTS[part]]
        return _prepare(part, downloaded, data_dir)

    folder = data_dir / VocSegmentation.name / part / str(VocSegmentation.VERSION)
    return prepared.once(folder, prepare)


def _prepare(part: str, places: Sequence[archives.Place], data_dir: pathlib.Path) -> None:
    folder = data_dir / VocSegmentation.name / part
    print(f"Preparing {part} from {places[-1].path} in {folder}", file=sys.stderr)
    with prepared.scratch(folder) as scratch:
        folders = {
            place.archive: archives.unpack(place, _PARTS[part][place.archive], scratch)
            for place in places
        }
        builder = VocSegmentation(folders=folders, config=part, data_dir=data_dir)
        prepared.write(builder, scratch)


def _key(places: Sequence[archives.Place]) -> str:
    """Hash of the names, sizes and modification times of the files that matter."""
    digest = hashlib.sha256()
    for place in places:
        for path in _files(place):
            try:
                status = path.stat()
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                state = "missing"  # the check will tell of it
            digest.update(f"{path.relative_to(place.path.parent)} {state}\n".encode())
    return digest.hexdigest()[:16]


def _files(place: archives.Place) -> list[pathlib.Path]:
    if not place.unpacked:
        return [place.path]
    if place.archive is VOC_ARCHIVE:
        lists = [place.path / _VOC_LISTS / f"{split}.txt" for split in ("train", "val")]
        pairs = [pair for split in _voc_pairs(place.path).values() for pair in split]
    else:
        lists = [place.path / f"{split}.txt" for split in ("train", "val")]
        pairs = _sbd_pairs(place.path)
    return [*lists, *(path for pair in pairs for path in (pair.image, pair.mask))]
