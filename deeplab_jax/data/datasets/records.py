"""Data sets that are prepared once: TFDS writes ArrayRecord files, and training reads those."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax.data.dataset import Example
from deeplab_jax.data.io import images, masks
from deeplab_jax.utils import progress
from deeplab_jax.utils.errors import UserError, print_warning
from deeplab_jax.utils.files import lock_folder
from deeplab_jax.utils.paths import expand_home, is_bucket, user_cache

_INFO = "dataset_info.json"  # that TFDS writes last


class RecordSource:
    """Reads the examples of prepared folders, one folder after the other.

    Pickles, and opens its files at first use in each process.
    """

    def __init__(self, parts: Sequence[tuple[pathlib.Path, str]]) -> None:
        """Takes pairs of a folder that TFDS wrote and a split of it."""
        skip = tfds.decode.SkipDecoding()  # OpenCV decodes twice as fast as TFDS does
        self._readers = [
            tfds.builder_from_directory(folder).as_data_source(
                split, decoders={"image": skip, "label": skip}
            )
            for folder, split in parts
        ]
        self._ends = list(itertools.accumulate(map(len, self._readers)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} examples")
        part = bisect.bisect_right(self._ends, index)
        record = self._readers[part][index - (self._ends[part - 1] if part else 0)]
        name = record["name"].decode()
        return Example(
            image=images.decode_image(record["image"], name),
            label=masks.decode_label(record["label"]),
            name=name,
        )


@dataclasses.dataclass(frozen=True)
class Record:
    """An example to write."""

    name: str
    read_image: Callable[[], bytes]  # returns the image file's bytes
    # Checks the example's files and returns its label, uint8 [height, width]. Called in threads.
    # Raises UserError for files that cannot be used.
    read_label: Callable[[], np.ndarray]


def prepare(
    name: str,
    config: str,
    title: str,
    source: str,
    files: Sequence[tuple[str, pathlib.Path]] | None,
    list_records: Callable[[pathlib.Path], Mapping[str, Sequence[Record]]],
) -> pathlib.Path:
    """Writes a part of a data set for TFDS, unless it exists, and returns its folder.

    One process at a time does so. All labels are read before the first record is written.

    Args:
      name: TFDS's name of the data set.
      config: TFDS's name of the part.
      title: the name of the part in messages.
      source: where the data comes from, for a message.
      files: names and paths of what a user's data set is made of; None: the official archives.
      list_records: returns the records of each split. Called with an empty temporary folder if the
        data set does not exist.

    Raises:
      UserError: files of the data set cannot be used, or the folder cannot be written. No partial
        folder is left.
    """
    where = data_dir()
    if files is not None:
        where = where / f"{name.partition('_')[0]}_roots" / fingerprint(files)
    parent = where / name / config
    folder = parent / str(_RecordBuilder.VERSION)
    url = _bucket_address(folder)
    if folder.is_dir() and not url:
        return folder
    if url and not folder.is_dir() and (copied := _download(url)):
        return copied
    try:
        with lock_folder(parent):
            if not folder.is_dir():  # another process may have prepared it meanwhile
                print(f"Preparing {title} from {source} in {parent}", file=sys.stderr)
                # A killed process may have left these. The lock says that no process uses them.
                for stale in parent.glob("incomplete.*"):
                    shutil.rmtree(stale)
                with tempfile.TemporaryDirectory(prefix="incomplete.", dir=parent) as scratch:
                    splits = list_records(pathlib.Path(scratch))
                    _write(name, config, title, where, splits, scratch)
            if url:
                _upload(folder, url)
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises RuntimeError
        raise UserError(
            f"{folder}: could not be prepared ({error}). Free space there, or set the environment "
            "variable TFDS_DATA_DIR to another folder. No partial folder is left there."
        ) from error
    return folder


def _write(
    name: str,
    config: str,
    title: str,
    where: pathlib.Path,
    splits: Mapping[str, Sequence[Record]],
    scratch: str,
) -> None:
    """Checks all records and then writes them. TFDS neither prints nor draws progress bars."""
    every = [record for split in splits.values() for record in split]
    encoded = progress.check_all(
        lambda record: masks.encode_label(record.read_label()), every, f"Checking {title}"
    )
    labels = iter(encoded)
    examples = {
        split: list(zip(records, labels, strict=False)) for split, records in splits.items()
    }
    part = tfds.core.BuilderConfig(name=config, description=title)
    builder = _RecordBuilder(name, part, examples, where)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_dir=scratch,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    finally:
        tfds.enable_progress_bar()


def _bucket_address(folder: pathlib.Path) -> str:
    """Returns the address of a folder in `data_dir`; empty if TFDS_DATA_DIR is no bucket."""
    root = os.environ.get("TFDS_DATA_DIR", "")
    name = folder.relative_to(data_dir()).as_posix() if is_bucket(root) else ""
    return name and f"{root.rstrip('/')}/{name}"


def _download(url: str) -> pathlib.Path | None:
    """Copies a prepared folder from a bucket, unless it is not there."""
    from deeplab_jax.buckets import staging
    from deeplab_jax.buckets.store import Store, Unreachable

    try:
        if not Store(url).list(_INFO):
            return None
    except Unreachable as error:
        raise UserError(f"TFDS_DATA_DIR: {error}. Try again later") from error
    return staging.stage(url, title="training reads each image many times")


def _upload(folder: pathlib.Path, url: str) -> None:
    """Copies a prepared folder to a bucket, `_INFO` last, unless it is there.

    Two hosts may do so at once: their files are the same.
    """
    from deeplab_jax.buckets import outputs
    from deeplab_jax.buckets.store import Store

    store = Store(url)

    def upload(name: str) -> None:
        outputs.upload(store, folder / name, name)

    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    names.remove(_INFO)
    try:
        if not store.list(_INFO):
            list(progress.parallel_map(upload, names, f"Uploading to {url}"))
            upload(_INFO)
    except UserError as error:
        print_warning(f"{folder} is only on this machine; others prepare it again: {error}")


class _RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes images as they are stored, labels as PNG, and names, in the order of the records."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        name: str,
        config: tfds.core.BuilderConfig,
        examples: Mapping[str, Sequence[tuple[Record, bytes]]],
        data_dir: pathlib.Path,
    ) -> None:
        self.name, self._examples = name, examples
        super().__init__(config=config, file_format="array_record", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        label = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
        features = {"image": image, "label": label, "name": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, _: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        return {split: self._generate_examples(each) for split, each in self._examples.items()}

    def _generate_examples(
        self, examples: Sequence[tuple[Record, bytes]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        title = f"Writing {self.builder_config.description}"
        for index, (record, label) in enumerate(progress.track(examples, title, len(examples))):
            yield index, {"image": record.read_image(), "label": label, "name": record.name}


def fingerprint(files: Iterable[tuple[str, pathlib.Path]]) -> str:
    """Hashes names, sizes and modification times of files and folders, which need not exist."""
    digest = hashlib.sha256()
    for name, path in files:
        try:
            status = path.stat()
            # The size of a folder differs between file systems.
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            state = f"{size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(f"{name} {state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def data_dir() -> pathlib.Path:
    """Returns the folder `TFDS_DATA_DIR`, by default `~/tensorflow_datasets`.

    If that is in a bucket, it is the folder in the user's cache whose data sets are shared there.

    Raises:
      UserError: it is another address.
    """
    folder = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if is_bucket(folder):
        return user_cache().absolute() / "deeplab_jax" / "tensorflow_datasets"
    if "://" in folder:
        raise UserError(f"TFDS_DATA_DIR must be a folder, or gs:// or s3://, got {folder}")
    return expand_home(folder).absolute()
