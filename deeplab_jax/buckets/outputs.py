"""Results of commands: those in a bucket are written to a temporary folder first, then uploaded."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Literal

from deeplab_jax.buckets.checkpoints import MARKER, marker, sums_of
from deeplab_jax.buckets.store import NUM_THREADS, Store, Unreachable, check_address
from deeplab_jax.utils.errors import UserError, print_warning
from deeplab_jax.utils.files import require_writable
from deeplab_jax.utils.paths import is_bucket, user_cache
from deeplab_jax.utils.progress import parallel_map

_RUN_FILES = ("config.json", "inputs.json")  # which are beside a run's checkpoints
_PATIENCE = 60.0  # seconds for which an upload is tried again

# Uploads a finished file and deletes it here; returns its address. For use in threads.
Move = Callable[[pathlib.Path], pathlib.Path | str]


class _UploadError(UserError):
    pass


def check(path: str, subject: str, *, kind: Literal["file", "folder", "new"] = "file") -> None:
    """Checks that a result can be written, before the work starts; creates folders on this machine.

    Args:
      path: its path, or address in a bucket.
      subject: names it in errors.
      kind: what it will be; or "new" for what must not exist.

    Raises:
      UserError: it exists as something else, belongs to a run, or may not be written; or the bucket
        is unreachable.
    """
    local = pathlib.Path(path)
    store, name = _parent(path) if is_bucket(path) else (None, local.name)
    if store:
        found = store.list(name) if kind != "folder" else {}
        exists, is_folder = bool(found), not name or bool(found.keys() - {name})
    else:
        exists, is_folder = local.exists(), local.is_dir()
    if kind == "new" and exists:
        raise UserError(f"{subject} exists already; choose another path, or remove it first")
    if kind == "file" and is_folder:
        raise UserError(f"{subject} is a folder")
    if name in _RUN_FILES and (
        store.list("checkpoints") if store else (local.parent / "checkpoints").is_dir()
    ):
        raise UserError(f"{subject} belongs to a run, which needs it to resume")
    if store:
        (Store(path) if kind == "folder" else store).check_writable()
    else:
        folder = local if kind == "folder" else local.absolute().parent
        about = subject if kind == "folder" else f"{subject}: the folder"
        require_writable(folder, about, create=True)


@contextlib.contextmanager
def local_output(
    path: str | os.PathLike[str], *, checkpoint: bool = False
) -> Iterator[tuple[pathlib.Path, Move | None]]:
    """Yields where to write a file or folder on this machine, and then uploads it to a bucket.

    Files beside it are uploaded too, before it, and files directly in a folder after the others. If
    the block raises, nothing is. A path that is not in a bucket is yielded as it is.

    Args:
      path: of the result.
      checkpoint: whether a folder is a checkpoint, which gets a marker that is uploaded last.

    Yields:
      The path; and, in a bucket, a function for files that shall not wait for the end.

    Raises:
      UserError: the bucket refuses a file, or cannot be reached for a minute. Files are kept then.
    """
    if not is_bucket(path):
        yield pathlib.Path(path), None
        return
    store, name = _parent(str(path))
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="deeplab_jax."))
    top, is_kept = scratch / store.bucket, False
    local = top / name

    def move(file: pathlib.Path, *, keep: bool = True) -> str:
        name = file.relative_to(top).as_posix()
        upload(store, file, name)
        if not keep:
            file.unlink()
        return store.url_of(name)

    try:
        (top if name else scratch).mkdir(exist_ok=True)
        yield local, functools.partial(move, keep=False)
        files = sorted(file for file in top.rglob("*") if file.is_file())
        last = [file for file in files if local in (file, file.parent)]
        if checkpoint and local.is_dir():
            last = [local / MARKER]  # instead of Orbax's, if there is one
            parts = [file for file in files if file not in last]
            sums = {file.relative_to(local).as_posix(): sums_of(file) for file in parts}
            last[0].write_bytes(marker(sums))
        for group in ([file for file in files if file not in last], last):
            title, quiet = f"Uploading to {path}", len(group) <= NUM_THREADS
            list(parallel_map(move, group, title, num_threads=NUM_THREADS, quiet=quiet))
    except _UploadError as error:
        is_kept = True
        raise UserError(f"{error}. What was not uploaded is kept in {top}") from error
    except UserError as error:
        raise UserError(str(error).replace(str(local), str(path))) from error
    finally:
        if not is_kept:
            shutil.rmtree(scratch, ignore_errors=True)


def shown(text: str) -> str:
    """Replaces paths of local copies in a text, or in JSON, by the addresses in buckets."""
    cache = os.path.abspath(user_cache() / "deeplab_jax" / "buckets")
    spelled = "|".join(map(re.escape, (cache, json.dumps(cache)[1:-1])))
    return re.sub(rf"(?:{spelled})/(gs|s3)/", r"\1://", text)


def _parent(path: str) -> tuple[Store, str]:
    """Returns the folder of an address, and the name in it; the name is empty for a bucket."""
    url = check_address(path)
    folder, _, name = url.rpartition("/")
    return (Store(url), "") if folder.endswith("/") else (Store(folder), name)


def upload(store: Store, file: pathlib.Path, name: str) -> None:
    """Uploads a file, for up to a minute while the bucket cannot be reached."""
    end, pause = time.monotonic() + _PATIENCE, 1.0
    while True:
        try:
            return store.upload(file, name)
        except UserError as error:
            if not isinstance(error, Unreachable) or time.monotonic() + pause > end:
                raise _UploadError(str(error)) from error
            print_warning(f"{error}; trying again")
        time.sleep(pause)
        pause = min(2 * pause, 15)
