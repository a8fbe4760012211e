"""The folder of a run: locks it, checks that it belongs to this run, and claims it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import jax

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config
from deeplab_jax.data.statistics import SampleSummary
from deeplab_jax.distributed import multihost
from deeplab_jax.utils.download import file_digest
from deeplab_jax.utils.errors import UserError, print_warning
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.utils.paths import expand_home, is_bucket, required_path
from deeplab_jax.weights import hub_folder
from deeplab_jax.weights.saved_model import check_format, find_checkpoint, step_folders

if TYPE_CHECKING:
    from deeplab_jax.buckets.run import BucketRun

# Files in a workdir.
_LOCK = ".lock"
_INPUTS = "inputs.json"

_PIXELS = "pixels of images"
# Fields that name weights. A run may resume with other paths if the contents are the same.
_INIT_PATHS = ("config.init.path", "config.init.backbone")

# The workdirs that this process has locked: a record lock never excludes its own process, and is
# lost as soon as that process closes the file anywhere.
_held: set[tuple[int, pathlib.Path]] = set()
_held_guard = threading.Lock()

Inputs = dict[str, Any]


class Workdir:
    """A run's folder, which all processes see; `buckets.run.BucketRun` is that of a bucket.

    Attributes:
      address: the folder, as messages name it.
      path: the folder.
      is_copied: whether each process has its own folder.
      is_failing: whether the run must end.
    """

    is_copied = is_failing = False

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        """Checks the path.

        Raises:
          UserError: it is empty, or an address, which would become a folder "az:" here.
        """
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(workdir)):
            raise UserError(
                f"--workdir {workdir} is neither a folder nor in a bucket: addresses begin with "
                "gs:// or s3://"
            )
        self.path = required_path(workdir, "--workdir").absolute()
        self.address = str(self.path)

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Locks the folder; see `lock_workdir`."""
        return lock_workdir(self.path)

    def exists(self, path: pathlib.Path) -> bool:
        """Whether the run has written a file."""
        return path.exists()

    def shown(self, path: pathlib.Path) -> str:
        """Returns a path in the folder as messages show it."""
        here = pathlib.Path.cwd()
        return str(path.relative_to(here) if path.is_relative_to(here) else path)


@contextlib.contextmanager
def open_workdir(
    workdir: str | os.PathLike[str], *, bucket_timeout: float, log: Callable[[str], None]
) -> Iterator[Workdir | BucketRun]:
    """Opens and locks the workdir of a run on all processes.

    Args:
      workdir: a folder, or an address in a bucket.
      bucket_timeout: seconds without the bucket after which the run ends.
      log: prints a line.

    Raises:
      UserError: the workdir is wrong, cannot be written to, or is in use.
    """
    index = jax.process_index()
    with contextlib.ExitStack() as stack:
        with multihost.raise_on_all_hosts():
            opened: Workdir | BucketRun
            if is_bucket(workdir):
                from deeplab_jax.buckets.run import BucketRun

                opened = BucketRun(str(workdir), process=index, patience=bucket_timeout, log=log)
            else:
                opened = Workdir(workdir)
            if index == 0:
                stack.enter_context(opened.hold())
        multihost.check_workdir(opened.address, is_copied=opened.is_copied)
        if not isinstance(opened, Workdir) and index > 0:
            stack.callback(opened.delete)
        update_copies(opened)
        yield opened


def update_copies(workdir: Workdir | BucketRun) -> None:
    """Brings the bucket and the other processes' copies up to date with process 0's, if any."""
    if isinstance(workdir, Workdir):
        return
    with multihost.raise_on_all_hosts():
        workdir.flush()
    with multihost.raise_on_all_hosts():
        if jax.process_index() > 0:
            workdir.update()


def collect_inputs(summaries: Mapping[str, SampleSummary]) -> Inputs:
    """Returns what identifies the data of a run, wherever they are stored.

    Args:
      summaries: one for each split, by the split's name.
    """
    inputs: Inputs = {}
    for split, summary in summaries.items():
        inputs[f"classes of {split}"] = list(summary.class_names)
        inputs[f"number of images of {split}"] = summary.num_examples
        inputs[f"names and labels of {split} (digest of some)"] = summary.label_digest
        inputs[f"{_PIXELS} of {split} (digest of some)"] = summary.image_digest
    return inputs


def check_workdir(
    workdir: Workdir | BucketRun, folder: pathlib.Path, config: Config, inputs: Inputs
) -> None:
    """Checks that a folder is free or holds a run of this config with these inputs.

    Args:
      workdir: of the run.
      folder: of one stage: that of the workdir, or one in it.
      config: of the stage.
      inputs: see `collect_inputs`.

    A run that wrote no checkpoint (for example, because of a mistake in its config) claims nothing.

    Raises:
      UserError: the folder holds another run; the message lists what differs.
    """
    if not step_folders(folder / "checkpoints"):
        return
    check_format(folder)
    path, shown = folder / "config.json", workdir.shown(folder)
    if not path.exists():
        raise UserError(f"{shown} holds checkpoints but no config.json; choose another --workdir")
    differing = config_lib.differences(portable(config, workdir.address), _read_json(path))
    if (folder / _INPUTS).exists():
        saved = _read_json(folder / _INPUTS)
        differing = {
            field: values
            for field, values in differing.items()
            if field.removeprefix("config.") not in config_lib.FREE_FIELDS
            and not _is_same_file(field, config, saved)
        }
        for name, value in inputs.items():
            if value == saved.get(name):
                continue
            if name.startswith(_PIXELS) and not config.train.strict_resume:
                print_warning(
                    f"{name}: not as at the start of this run. Either the images were changed, or "
                    "another OpenCV decodes them; the run will not end with the same bits"
                )
            else:
                differing[name] = f"{value} here, {saved.get(name)} there"
    if differing:
        lines = "\n".join(f"  {name}: {values}" for name, values in differing.items())
        advice = "Choose another --workdir, or run with the config in its config.json."
        if "config.train.steps" in differing:
            advice += (
                "\nTo train on after the end of this run, start another from its parameters: "
                f"--config.init.path={shown} and another --workdir. The learning rate then starts "
                "again from config.optimizer.learning_rate."
            )
        raise UserError(f"{shown} holds a run with another config:\n{lines}\n{advice}")


def claim_workdir(
    workdir: Workdir | BucketRun, folder: pathlib.Path, config: Config, inputs: Inputs
) -> None:
    """Creates a folder and writes the config and the inputs of its run into it.

    The arguments are those of `check_workdir`.

    Raises:
      UserError: the folder cannot be written.
    """
    files = {"config.json": config_lib.to_json(portable(config, workdir.address))}
    if not step_folders(folder / "checkpoints"):
        digests = {field: _digest(_path_of(field, config)) for field in _INIT_PATHS}
        files[_INPUTS] = json.dumps(inputs | digests, indent=2) + "\n"
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_bytes(folder / name, text.encode())
    except OSError as error:
        raise UserError(f"cannot write to --workdir {folder}: {error.strerror}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); choose another --workdir") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} does not hold named fields; choose another --workdir")
    return fields


def portable(config: Config, address: str) -> Config:
    """The config with an `init.path` inside the workdir relative to it, as in a second stage."""
    path = config.init.path.removeprefix(f"{address}/")
    return dataclasses.replace(config, init=dataclasses.replace(config.init, path=path))


def _path_of(field: str, config: Config) -> str:
    return config_lib.flatten(config)[field.removeprefix("config.")]


def _is_same_file(field: str, config: Config, saved: Inputs) -> bool:
    """Whether a field names weights that are those of the start of the run, under another path."""
    if field not in _INIT_PATHS or saved.get(field) is None:
        return False
    return _digest(_path_of(field, config)) == saved[field]


def _digest(source: str) -> str | None:
    """A digest of a weights file, or of the model in a checkpoint; None if it is no path."""
    path = expand_home(source)
    if not source or not path.exists():
        return None
    if path.is_file():
        return file_digest(path, "sha256")[:16]
    if hub_folder.is_hub_folder(path):
        folder, files = path, hub_folder.files(path)
    else:
        folder = find_checkpoint(path)
        files = sorted(each for each in (folder / "model").rglob("*") if each.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file_digest(file, 'sha256')}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def lock_workdir(folder: pathlib.Path) -> Iterator[None]:
    """Locks a workdir for one run, and creates the folder if it is absent.

    The lock is a POSIX record lock on the file `.lock`. The system releases it when the process
    ends, even by SIGKILL, and network file systems with a lock service (NFS, Lustre) enforce it
    between hosts. A file system without locks gives a warning, or the error below if the process
    that `.lock` names runs on this host.

    Raises:
      UserError: another run has the lock; the message names its process and host.
    """
    with contextlib.ExitStack() as stack:
        try:
            existed = folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_only_in_process(folder))
            file = _open_locked(folder)
        except OSError as error:
            raise UserError(f"cannot write to --workdir {folder}: {error.strerror}") from error
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)
            file.close()
            if not existed:  # leaves no empty folder if the run failed before it wrote anything
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextlib.contextmanager
def _only_in_process(folder: pathlib.Path) -> Iterator[None]:
    """Refuses a workdir that another thread of this process has locked."""
    key = os.getpid(), folder.resolve()
    with _held_guard:
        if key in _held:
            raise UserError(
                f"--workdir {folder} is in use by another run of this process {os.getpid()}: wait "
                "for it, or choose another --workdir"
            )
        _held.add(key)
    try:
        yield
    finally:
        with _held_guard:
            _held.discard(key)


def _open_locked(folder: pathlib.Path) -> TextIO:
    path = folder / _LOCK
    while True:
        file = path.open("a+")
        holder = _read_holder(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_locked = error.errno in (errno.EACCES, errno.EAGAIN)
            if is_locked or _is_running(holder):
                file.close()
                raise UserError(
                    f"--workdir {folder} is in use by process {holder['pid']} on host "
                    f"{holder['host']}: wait for it or stop it, or choose another --workdir"
                ) from error
            print_warning(
                f"{folder} is on a file system without locks ({error.strerror}): make sure that no "
                "other run uses it"
            )
        # The former holder may have deleted the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
                file.flush()
                return file
        file.close()


def _read_holder(file: TextIO) -> dict[str, object]:
    file.seek(0)
    try:
        holder = json.load(file)
        return {"pid": int(holder["pid"]), "host": str(holder["host"])}
    except (ValueError, KeyError, TypeError):  # empty: the holder has not written it yet
        return {"pid": "unknown", "host": "unknown"}


def _is_running(holder: dict[str, object]) -> bool:
    if holder["host"] != socket.gethostname() or holder["pid"] == os.getpid():
        return False
    try:
        os.kill(int(str(holder["pid"])), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs as another user
    return True
