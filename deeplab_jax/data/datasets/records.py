"""Data sets that are prepared once: TFDS writes ArrayRecord files, and training reads those."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import fcntl
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
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import expand_home


class RecordSource:
    """Reads the examples of prepared folders, one folder after the other.

    Pickles, and opens its files at first use in each process.

    Args:
      parts: pairs of a folder that TFDS wrote and a split of it.
    """

    def __init__(self, parts: Sequence[tuple[pathlib.Path, str]]) -> None:
        skip = tfds.decode.SkipDecoding()  # OpenCV decodes twice as fast as TFDS does
        self._readers = [
            tfds.builder_from_directory(folder).as_data_source(
                split, decoders={"image": skip, "label": skip}
            )
            for folder, split in parts
        ]
        self._ends = list(itertools.accumulate(len(reader) for reader in self._readers))

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
    """An example to write.

    Attributes:
      name: name of the example.
      read_image: returns the image file's bytes.
      read_label: checks the example's files and returns its label, uint8 `[height, width]`. Called
        in threads. Raises UserError for files that cannot be used.
    """

    name: str
    read_image: Callable[[], bytes]
    read_label: Callable[[], np.ndarray]


def prepare(
    name: str,
    config: str,
    title: str,
    data_dir: pathlib.Path,
    source: str,
    list_records: Callable[[pathlib.Path], Mapping[str, Sequence[Record]]],
) -> pathlib.Path:
    """Writes a data set for TFDS, unless it exists. One process at a time does so.

    All labels are read before the first record is written.

    Args:
      name: TFDS's name of the data set.
      config: TFDS's name of a part of it.
      title: the name of the part in messages.
      data_dir: the folder for TFDS's data sets.
      source: where the data comes from, for a message.
      list_records: returns the records of each split. Called with an empty temporary folder if the
        data set does not exist.

    Returns:
      The folder of the part.

    Raises:
      UserError: files of the data set cannot be used, or the folder cannot be written. No partial
        folder is left.
    """

    def encode_label(record: Record) -> bytes:
        return masks.encode_label(record.read_label())

    parent = data_dir / name / config
    folder = parent / str(_RecordBuilder.VERSION)
    if folder.is_dir():
        return folder
    try:
        with lock_folder(parent):
            if folder.is_dir():  # another process prepared it meanwhile
                return folder
            print(f"Preparing {title} from {source} in {parent}", file=sys.stderr)
            # A killed process may have left these. The lock says that no process uses them.
            for stale in parent.glob("incomplete.*"):
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(prefix="incomplete.", dir=parent) as scratch:
                splits = list_records(pathlib.Path(scratch))
                every = [record for split in splits.values() for record in split]
                labels = iter(progress.check_all(encode_label, every, f"Checking {title}"))
                examples = {
                    split: list(zip(records, labels, strict=False))
                    for split, records in splits.items()
                }
                builder = _RecordBuilder(name, config, title, examples, data_dir=data_dir)
                with _quiet_tfds():
                    builder.download_and_prepare(
                        download_dir=scratch,
                        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                    )
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises RuntimeError
        raise UserError(
            f"{folder}: could not be prepared ({error}). Free space there, or set the environment "
            "variable TFDS_DATA_DIR to another folder. No partial folder is left there."
        ) from error
    return folder


class _RecordBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes images as they are stored, labels as PNG, and names, in the order of the records."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        name: str,
        config: str,
        title: str,
        examples: Mapping[str, Sequence[tuple[Record, bytes]]],
        **kwargs: Any,
    ) -> None:
        self.name = name
        self._examples = examples
        builder_config = tfds.core.BuilderConfig(name=config, description=title)
        super().__init__(config=builder_config, file_format="array_record", **kwargs)

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

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the files are on this machine
        return {split: self._generate_examples(each) for split, each in self._examples.items()}

    def _generate_examples(
        self, examples: Sequence[tuple[Record, bytes]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        title = f"Writing {self.builder_config.description}"
        for index, (record, label) in enumerate(progress.track(examples, title, len(examples))):
            yield index, {"image": record.read_image(), "label": label, "name": record.name}


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from writing to stdout and from drawing its own progress bars."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def fingerprint(files: Iterable[tuple[str, pathlib.Path]]) -> str:
    """Returns a hash of names, sizes and modification times, which changes with the files.

    Args:
      files: the name and the path of each file or folder. It need not exist.
    """
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

    Raises:
      UserError: it is not a folder of this machine.
    """
    folder = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in folder:
        raise UserError(f"TFDS_DATA_DIR must be a folder of this machine, got {folder}")
    return expand_home(folder).absolute()


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path) -> Iterator[None]:
    """Creates and locks a folder; waits for other processes. A killed process's lock is freed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
