"""Mirrors the local folder of a run to a bucket, each state of which can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable

from deeplab_jax.buckets.checkpoints import (
    MARKER,
    Sums,
    checkpoint_of,
    marked_files,
    marker,
    sums_of,
)
from deeplab_jax.buckets.store import NUM_THREADS, Entry, Store, Unreachable
from deeplab_jax.utils.download import file_digest
from deeplab_jax.utils.errors import UserError, first_line

# In seconds.
_LOOK = 2.0  # between two looks at the folder
_PLAIN = 10.0  # between two uploads of files that grow
_RETRY, _MAX_RETRY = 1.0, 30.0  # after the first failure, doubled at each further one
_JOIN = 5.0  # that a request in progress may delay the end

_Stamp = tuple[int, int]  # size of a local file, and time of its modification in ns
_Files = dict[str, _Stamp]  # by name


class BucketLost(UserError):
    """The bucket did not answer for too long; the run is complete in the local folder."""

    exit_code = 1


class Mirror:
    """A thread that mirrors a folder to a store, until it is closed.

    Not mirrored: hidden files, unfinished ones, and the folder `broken`. What is gone from the
    folder stays in the bucket, except for checkpoints: they are deleted once the folder's newest
    checkpoint is in the bucket.

    Attributes:
      is_whole: whether all of the folder was in the bucket when the mirror was closed.
    """

    def __init__(
        self,
        store: Store,
        folder: pathlib.Path,
        *,
        patience: float,
        log: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the thread.

        Args:
          store: to write to. Nobody else may write to it.
          folder: to read; its finished checkpoints never change.
          patience: seconds without an answer of the bucket after which it counts as lost.
          log: prints a line.
          check: called before each write; see `Lease.confirm`.
        """
        self._store, self._folder, self._patience = store, folder, patience
        self._log, self._check_lease = log, check
        # What the bucket holds: an entry as found at the start, or the file that was uploaded.
        self._objects: dict[str, Entry | _Stamp] = {}
        self._is_listed = False
        self._marked: dict[str, dict[str, int]] = {}  # sizes of the files of complete checkpoints
        self._sums: dict[tuple[str, _Stamp], Sums] = {}
        self._requested = self._done = 0  # calls of `flush`
        self._plain_time = -_PLAIN
        self._answered = time.monotonic()
        self._reason = ""  # of the failure, until all is in the bucket again
        self._failing = threading.Lock()
        self._fatal: BaseException | None = None
        self._stopped = self.is_whole = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            with contextlib.suppress(UserError):  # the first error says more
                self.close()
        else:  # such as a second Ctrl-C
            self.stop()

    def check(self) -> None:
        """Checks that the bucket answers.

        Raises:
          BucketLost: it does not, for `patience` seconds.
          UserError: another process took the run over.
        """
        if self._fatal is not None:
            raise self._fatal
        try:
            self._check_lease()
        except Unreachable as error:  # a request of the thread may wait for minutes
            self._fail(error)
        if self._reason and time.monotonic() - self._answered > self._patience:
            checkpoints = _scan(self._folder)[1]
            times = {
                name: max(time for _, time in checkpoints[name].values()) for name in checkpoints
            }
            newest = self._folder / max(times, key=times.__getitem__) if times else "none yet"
            raise BucketLost(
                f"{self._store.url} cannot be reached for more than {self._patience:.0f} s "
                f"({self._reason}). The run is in {self._folder}, its newest checkpoint: {newest}. "
                "Once the bucket answers again, the same command on this machine goes on from it"
            )

    def flush(self) -> None:
        """Waits until all that the folder holds now is in the bucket.

        Raises:
          BucketLost: the bucket does not answer for `patience` seconds.
          UserError: another process took the run over.
        """
        self._requested += 1
        request = self._requested
        self._wake.set()
        is_told = False
        while self._done < request and self._thread.is_alive():
            self.check()
            if self._reason and not is_told:
                self._log(f"waiting for {self._store.url}, up to {self._patience:.0f} s")
                is_told = True
            self._thread.join(0.05)  # in small steps, so that signals are seen
        if self._done < request:
            self.check()

    def close(self) -> None:
        """Does what `flush` does, and ends the thread; the errors are those of `flush`."""
        try:
            self.flush()
            self.is_whole = True
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends the thread without further writes."""
        self._stopped = True
        self._wake.set()
        self._thread.join(0 if self._reason else _JOIN)

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self._fatal = error

    def _loop(self) -> None:
        wait, retry = 0.0, _RETRY
        while True:
            self._wake.wait(wait)
            self._wake.clear()
            if self._stopped:
                return
            try:
                request = self._requested
                is_more = self._mirror(everything=request > self._done)
            except (OSError, UserError) as error:
                if self._stopped:
                    return
                with contextlib.suppress(Unreachable):
                    self._check_lease()  # ends this thread if the lease is lost
                self._fail(error)
                wait, retry = retry, min(2 * retry, _MAX_RETRY)
                continue
            wait, retry = 0.0 if is_more else _LOOK, _RETRY
            if not is_more:
                if self._reason:
                    self._log(f"{self._store.url} answers again, and has all that was late")
                self._reason = ""
                self._done = request

    def _fail(self, error: Exception) -> None:
        with self._failing:
            if not self._reason:
                self._log(
                    f"{self._store.url} cannot be reached ({first_line(error)}): saves stay in "
                    f"{self._folder} until it answers"
                )
            self._reason = first_line(error)

    def _mirror(self, *, everything: bool) -> bool:
        """Uploads the newest missing checkpoint and plain files; returns whether there is more.

        Args:
          everything: whether to upload plain files even if the last upload was just now.
        """
        self._check_lease()
        if not self._reason:
            self._answered = time.monotonic()
        plain, checkpoints = _scan(self._folder)
        if not self._is_listed:
            self._list()
        self._delete_gone(checkpoints)
        missing = [each for each in checkpoints if not self._is_complete(each, checkpoints[each])]
        newest = max(missing, key=_step, default=None)
        if newest is not None:
            self._upload_checkpoint(newest, checkpoints[newest])
        is_due = time.monotonic() - self._plain_time >= _PLAIN
        if newest is not None or is_due or everything:
            for name in plain:
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    self._upload(name, is_growing=True)
            self._plain_time = time.monotonic()
        if newest is not None:
            self._mark(newest, checkpoints[newest])
        return newest is not None

    def _list(self) -> None:
        """Reads what the bucket has."""
        found = self._store.list()
        for name in found:
            checkpoint = checkpoint_of(name)
            if checkpoint and name == f"{checkpoint}/{MARKER}":
                files = marked_files(checkpoint, self._store.read(name) or b"", found)
                self._marked[checkpoint] = {
                    name: sums[0] if sums else found[name].size for name, sums in files.items()
                }
        self._objects = dict(found)
        self._is_listed = True

    def _is_complete(self, checkpoint: str, files: _Files) -> bool:
        """Whether the bucket has a checkpoint with these files.

        It may have more, because a kill can interrupt the deletion of the one here.
        """
        sizes = {name: size for name, (size, _) in files.items()}
        is_marked = bool(sizes) and sizes.items() <= self._marked.get(checkpoint, {}).items()
        return is_marked and all(_size(self._objects.get(name)) == sizes[name] for name in sizes)

    def _delete_gone(self, checkpoints: dict[str, _Files]) -> None:
        there = set(map(checkpoint_of, self._objects)) - {""}
        for gone in there - checkpoints.keys():
            place = gone.rpartition("/")[0]
            beside = [each for each in checkpoints if each.rpartition("/")[0] == place]
            newest = max(beside, key=_step, default="")
            if gone not in self._marked or self._is_complete(newest, checkpoints.get(newest, {})):
                self._delete(gone)

    def _delete(self, checkpoint: str, keep: Iterable[str] = ()) -> None:
        """Deletes a checkpoint's marker, then its files."""
        self._marked.pop(checkpoint, None)
        names = {name for name in self._objects if name.startswith(f"{checkpoint}/")}
        for name in sorted(names.difference(keep), key=f"{checkpoint}/{MARKER}".__ne__):
            self._request(self._store.delete, [name])
            del self._objects[name]

    def _upload_checkpoint(self, checkpoint: str, files: _Files) -> None:
        """Uploads the files of a checkpoint without its marker."""
        self._delete(checkpoint, keep=files)

        def upload(name: str) -> None:
            if (name, files[name]) not in self._sums:
                self._sums[name, files[name]] = sums_of(self._folder / name)
            self._upload(name)

        try:
            _in_threads(upload, files)
        except (OSError, UserError):
            if _files_of(self._folder, checkpoint) == files:
                raise  # else it is being deleted here, and is not marked

    def _mark(self, checkpoint: str, files: _Files) -> None:
        if _files_of(self._folder, checkpoint) != files:
            return
        name = f"{checkpoint}/{MARKER}"
        sums = {key[0].removeprefix(f"{checkpoint}/"): self._sums[key] for key in files.items()}
        self._request(self._store.write, name, marker(sums))
        self._objects[name] = (0, 0)
        self._marked[checkpoint] = {name: size for name, (size, _) in files.items()}
        self._sums.clear()

    def _upload(self, name: str, *, is_growing: bool = False) -> None:
        path = self._folder / name
        stamp = _stamp(path)  # before the content, so that what is appended later changes it
        there = self._objects.get(name)
        if there == stamp:
            return
        md5 = there.md5 if isinstance(there, Entry) else ""
        if is_growing:
            content = path.read_bytes()
            if path.suffix == ".jsonl":
                content = content[: content.rfind(b"\n") + 1]
            if not md5 or md5 != hashlib.md5(content, usedforsecurity=False).hexdigest():
                self._request(self._store.write, name, content)
        elif not md5 or md5 != file_digest(path, "md5"):
            self._request(self._store.upload, path, name)
        self._objects[name] = stamp

    def _request(self, write: Callable[..., None], *arguments: object) -> None:
        if self._stopped:
            raise Unreachable("the mirror was stopped")
        self._check_lease()
        write(*arguments)
        self._answered = time.monotonic()


def _scan(folder: pathlib.Path) -> tuple[list[str], dict[str, _Files]]:
    """Returns the names of plain files, and the files of each finished checkpoint by its name."""
    plain, checkpoints = list[str](), dict[str, _Files]()
    for top, folders, files in os.walk(folder):
        place = pathlib.Path(top).relative_to(folder)
        names = [str(place / each) for each in folders if _is_mirrored(each)]
        steps = [name for name in names if checkpoint_of(f"{name}/")]
        checkpoints |= {name: found for name in steps if (found := _files_of(folder, name))}
        folders[:] = [name.rpartition("/")[2] for name in names if name not in steps]
        plain += [str(place / each) for each in files if _is_mirrored(each)]
    return sorted(plain), checkpoints


def _is_mirrored(name: str) -> bool:
    is_unfinished = name.endswith(".partial") or ".orbax-checkpoint-tmp" in name
    return not name.startswith(".") and not is_unfinished and name != "broken"


def _files_of(folder: pathlib.Path, checkpoint: str) -> _Files:
    found: _Files = {}
    for top, _, files in os.walk(folder / checkpoint):
        for path in (pathlib.Path(top, each) for each in files):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                found[str(path.relative_to(folder))] = _stamp(path)
    found.pop(f"{checkpoint}/{MARKER}", None)  # Orbax's, with another content
    return found


def _stamp(path: pathlib.Path) -> _Stamp:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _size(there: Entry | _Stamp | None) -> int:
    return there.size if isinstance(there, Entry) else there[0] if there else -1


def _step(checkpoint: str) -> int:
    return int(checkpoint.rpartition("/")[2])


def _in_threads(function: Callable[[str], None], names: Iterable[str]) -> None:
    """Calls a function for each name in a few threads, which do not delay the program's end."""
    waiting, errors = iter(list(names)), list[BaseException]()

    def work() -> None:
        try:
            for name in waiting:
                if errors:
                    return
                function(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
