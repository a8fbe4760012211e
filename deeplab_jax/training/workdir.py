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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

import jax

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config
from deeplab_jax.distributed import multihost
from deeplab_jax.utils.download import file_digest
from deeplab_jax.utils.errors import UserError, print_warning
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.utils.paths import expand_home, is_bucket, required_path
from deeplab_jax.weights import hub_folder
from deeplab_jax.weights.saved_model import check_format, find_checkpoint, step_folders

if TYPE_CHECKING:
    from deeplab_jax.buckets.run import BucketRun

_LOCK, _INPUTS = ".lock", "inputs.json"  # files in a workdir
PIXELS = "pixels of images"
# Fields that name weights. A run may resume with other paths if the contents are the same.
_INIT_PATHS = ("config.init.path", "config.init.backbone")

# The workdirs that this process has locked: a record lock never excludes its own process, and is
# lost as soon as that process closes the file anywhere.
_held: set[tuple[int, pathlib.Path]] = set()
_held_guard = threading.Lock()

Inputs = dict[str, Any]


class Workdir:
    """A run's folder, which all processes see; its counterpart is `buckets.run.BucketRun`."""

    is_copied = is_failing = False

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        """Raises UserError if it is empty, or an address, which would become a folder "az:"."""
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(workdir)):
            raise UserError(
                f"--workdir {workdir} is neither a folder nor in a bucket: addresses begin with "
                "gs:// or s3://"
            )
        self.path = required_path(workdir, "--workdir").absolute()
        self.address = str(self.path)

    def hold(self) -> contextlib.AbstractContextManager[None]:
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
    """Opens and locks the workdir of a run on all processes; the arguments are those of `train`.

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
        # Paths of one shared folder may differ between hosts; `check_shared` compares folders.
        address = opened.address if opened.is_copied else "a folder"
        multihost.check_equal({"--workdir": address})
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
    # Processes that restore other steps would wait for each other without end.
    steps = [folder.name for folder in step_folders(workdir.path / "checkpoints")]
    multihost.check_equal({f"checkpoints in the copy of {workdir.address}": steps})


def check_workdir(
    workdir: Workdir | BucketRun, folder: pathlib.Path, config: Config, inputs: Inputs
) -> None:
    """Checks that a folder is free or holds a run of this config with these inputs.

    A run that wrote no checkpoint (for example, because of a mistake in its config) claims nothing.

    Args:
      workdir: of the run.
      folder: of the stage, the workdir or a folder in it.
      config: of the stage.
      inputs: see `train.summarize_split`; empty: they are not checked.

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
    is_known = (folder / _INPUTS).exists()  # else paths of data must be the same
    saved = _read_json(folder / _INPUTS) if is_known else {}
    differing = {
        field: values
        for field, values in differing.items()
        if not (is_known and field.removeprefix("config.") in config_lib.FREE_FIELDS)
        # Weights under another path may be those of the start of the run.
        and not (saved.get(field) and saved[field] == _digest(field, config))
    }
    for name, value in inputs.items() if is_known else ():
        if value == saved.get(name):
            continue
        if name.startswith(PIXELS) and not config.train.strict_resume:
            print_warning(
                f"{name}: not as at the start of this run. Either the images were changed, or "
                "another OpenCV decodes them; the run will not end with the same bits"
            )
        else:
            differing[name] = f"{value} here, {saved.get(name)} there"
    if not differing:
        return
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
        digests = {field: _digest(field, config) for field in _INIT_PATHS}
        files[_INPUTS] = json.dumps(inputs | digests, indent=2) + "\n"
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_bytes(folder / name, text.encode())
    except OSError as error:
        raise UserError(f"cannot write to --workdir {folder}: {error.strerror}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text())}  # TypeError unless these are named fields
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another --workdir") from error


def portable(config: Config, address: str) -> Config:
    """The config with an `init.path` inside the workdir relative to it, as in a second stage."""
    path = config.init.path.removeprefix(f"{address}/")
    return dataclasses.replace(config, init=dataclasses.replace(config.init, path=path))


def _digest(field: str, config: Config) -> str | None:
    """A digest of the weights file, or checkpoint, at one of `_INIT_PATHS`; None if it is none."""
    source = config_lib.flatten(config)[field.removeprefix("config.")]
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
    between hosts. A file system without locks gives a warning.

    Raises:
      UserError: another run has the lock; the message names its process and host.
    """
    key = os.getpid(), pathlib.Path(os.path.realpath(folder))
    with _held_guard:
        if key in _held:
            raise UserError(
                f"--workdir {folder} is in use by another run of this process {os.getpid()}: wait "
                "for it, or choose another --workdir"
            )
        _held.add(key)
    try:
        try:
            existed = folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
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
    finally:
        _held.discard(key)


def _open_locked(folder: pathlib.Path) -> TextIO:
    path = folder / _LOCK
    while True:
        file = path.open("a+", errors="replace")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read()
            if error.errno in (errno.EACCES, errno.EAGAIN) or _is_running(holder):
                file.close()
                raise UserError(
                    f"--workdir {folder} is in use by {holder or 'another process'}: wait for it "
                    "or stop it, or choose another --workdir"
                ) from error
            print_warning(
                f"{folder} is on a file system without locks ({error.strerror}): make sure that no "
                "other run uses it" + (f"; the last one was {holder}" if holder else "")
            )
        # The former holder may have deleted the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on host {socket.gethostname()}")
                file.flush()
                return file
        file.close()


def _is_running(holder: str) -> bool:
    """Returns whether the holder of a lock, as its file names it, is a process of this host."""
    named = re.fullmatch(r"process (\d+) on host (.+)", holder)
    if named is None or named[2] != socket.gethostname() or int(named[1]) == os.getpid():
        return False
    try:
        os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs as another user
    return True
