"""Data sets that TFDS prepares once, in ArrayRecord files, and that are read from there."""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import io
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds

from deeplab_jax.config import DataConfig
from deeplab_jax.data.dataset import Example
from deeplab_jax.data.io import reading
from deeplab_jax.data.labels import IGNORE
from deeplab_jax.utils.errors import UserError


class RecordSource:
    """Examples of prepared TFDS folders, one after the other.

    It pickles, and opens its files at first use in each process.

    Args:
      parts: a folder of TFDS and a split of it, for each.
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
        return Example(
            image=reading.decode_image(record["image"]),
            label=reading.decode_label(record["label"]),
            name=record["name"].decode(),
        )


def check_ignore_label(title: str, config: DataConfig) -> None:
    """Raises UserError if a config wants another id than that of what is stored ignored."""
    if config.ignore_label != IGNORE:
        raise UserError(
            f"{title}'s ignored pixels have id {IGNORE}: "
            f"config.data.ignore_label must be {IGNORE}, got {config.ignore_label}"
        )


def features() -> tfds.features.FeaturesDict:
    """What `RecordSource` reads: a JPEG as it came, a PNG of ids, and a name."""
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
    label = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
    return tfds.features.FeaturesDict(
        {"image": image, "label": label, "name": tfds.features.Text()}
    )


def once(folder: pathlib.Path, prepare: Callable[[], None]) -> pathlib.Path:
    """The folder that `prepare` makes, made if it is not there yet; by one process at a time.

    Raises:
      UserError: it cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        with locked(folder.parent):
            if not folder.is_dir():  # or another process was faster
                prepare()
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises RuntimeError
        raise UserError(
            f"{folder}: could not be prepared ({error}). Free space there, or set the environment "
            "variable TFDS_DATA_DIR to another folder. Nothing half-written is left in its place."
        ) from error
    return folder


@contextlib.contextmanager
def scratch(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder for what is needed while one that is locked is prepared; TFDS is quiet meanwhile."""
    # Left by a process that was killed: the lock is ours, so nobody else writes here.
    for stale in folder.glob("incomplete.*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix="incomplete.", dir=folder) as name, _quiet_tfds():
        yield pathlib.Path(name)


def write(builder: tfds.core.GeneratorBasedBuilder, download_dir: pathlib.Path) -> None:
    """Writes a builder's examples aside, then renames."""
    builder.download_and_prepare(
        download_dir=download_dir,
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from writing to stdout, and from drawing bars besides ours."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def data_dir() -> pathlib.Path:
    """`TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      UserError: it is no folder of this machine.
    """
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if "://" in folder:
        raise UserError(f"TFDS_DATA_DIR must be a folder of this machine, got {folder}")
    return pathlib.Path(folder).expanduser().absolute()


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds a folder for this process; others wait. A killed process lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
