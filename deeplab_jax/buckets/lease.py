"""The lock of a run in a bucket: a numbered object, which its holder renews.

`.lease/000007.json` names a holder. The highest number has the run, and creating the next number
takes it: only one process can create an object. A process that was killed does not renew, which
others measure by their own clocks; clocks of two machines are never compared. On one machine a file
lock beside the local copy tells at once whether the holder lives: the system frees it with the
process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from deeplab_jax.buckets.store import Store, Unreachable
from deeplab_jax.utils.errors import UserError

_RENEWAL = 10.0  # seconds
_WATCH = 30.0  # seconds without a renewal after which a holder counts as dead
_LOOK = 2.0  # seconds between two looks at its lease
_JOIN = 5.0  # seconds that a renewal in progress may delay a release

_COMPLETE = ".complete"  # in a local copy that had all that the bucket had

Holder = dict[str, Any]  # content of a lease
_FIELDS = {"pid", "host", "copy", "nonce", "turn", "ended"}


class Lease:
    """The lease of a run, renewed by a thread until it is released.

    Attributes:
      lost: process and host of the new holder if another process took the run over, else empty.
      is_copy_complete: whether the local copy has all that the bucket has: it once had, and nobody
        else has had the run since.
    """

    def __init__(self, store: Store, folder: pathlib.Path, log: Callable[[str], None]) -> None:
        """Takes a run.

        Args:
          store: of the run.
          folder: local copy of the run. The lock is beside it, and outlives it.
          log: prints a line.

        Raises:
          UserError: another process has the run; the message names it.
          Unreachable: the bucket cannot be reached.
        """
        self.lost = ""
        self._own: Holder = {}
        self._store, self._mark = store, folder / _COMPLETE
        self._lock = folder.with_name(f"{folder.name}.lock").open("a+")
        try:
            self._take(log)
        except BaseException:
            self._lock.close()
            raise
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is None or isinstance(error, Exception):
            self.release()
        else:  # such as a second Ctrl-C, after which nobody waits for the bucket
            self._end.set()
            self._lock.close()

    def mark_complete(self) -> None:
        """Records that the local copy has all that the bucket has."""
        self._mark.touch()

    def unmark_complete(self) -> None:
        """Records that the local copy may lack files, before it is deleted."""
        self._mark.unlink(missing_ok=True)

    def confirm(self) -> None:
        """Checks that no other process can have taken the run over, before a write to it.

        Raises:
          UserError: one has; the message names it.
          Unreachable: one can have, because the lease was not renewed for `_WATCH` seconds.
        """
        if self.lost:
            raise UserError(
                f"the run {self._store.url} was taken over by {self.lost} while this process could "
                "not renew its lease; this process stops, and the run goes on there"
            )
        if _now() - self._renewed >= _WATCH:
            raise Unreachable("the lease of the run could not be renewed")

    def release(self) -> None:
        """Ends the lease, so that the next process need not wait."""
        self._end.set()
        self._thread.join(_JOIN)
        with contextlib.suppress(UserError):  # the next process waits until it counts as dead
            self.confirm()
            if not self._thread.is_alive():
                self._write(ended=True)
        self._lock.close()

    def _take(self, log: Callable[[str], None]) -> None:
        nonce = secrets.token_hex(8)
        while True:
            before, holder, copy = self._wait_until_free(log)
            if holder.get("copy") != copy:
                self.unmark_complete()
            self._number = before + 1
            self._own = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "copy": copy,
                "nonce": nonce,
                "turn": 0,
                "ended": False,
            }
            self._renewed = _now()  # a moment before the last renewal
            # The answer to an earlier attempt may be lost: then the object is there.
            content = json.dumps(self._own).encode()
            created = self._store.create(_name(self._number), content)
            # Meanwhile others may have taken later numbers and deleted this one.
            newest, holder = _newest(self._store)
            if newest == self._number and (created or holder["nonce"] == nonce):
                old = [number for number in _numbers(self._store) if number < before]
                self._store.delete(map(_name, old))
                self.is_copy_complete = self._mark.exists()
                return

    def _wait_until_free(self, log: Callable[[str], None]) -> tuple[int, Holder, str]:
        """Locks the local copy, and waits until nobody has the run.

        Returns:
          The number and content of the newest lease, and what names the local copy.
        """
        turns = list[tuple[int, int]]()  # in which others held it
        said, begin = "", time.monotonic()
        while True:
            copy = self._lock_copy()
            number, holder = _newest(self._store)
            is_free = not holder or holder["ended"]
            is_here = not is_free and holder["host"] == socket.gethostname()
            # On this machine, the holder of this copy had its lock.
            if copy and (is_free or (is_here and holder["copy"] == copy)):
                return number, holder, copy
            if is_free:
                say = f"waiting for the process that ends or begins {self._store.url}"
            else:
                in_use = f"{self._store.url} is in use by {_describe(holder)}"
                turns.append((number, holder["turn"]))
                if (is_here and not copy) or turns[-1] != turns[0]:
                    raise UserError(
                        f"{in_use}: wait for it or stop it, or choose another --workdir"
                    )
                say = f"{in_use}, or was: watching for {_WATCH:.0f} s whether it still runs"
                if copy and time.monotonic() - begin >= _WATCH:
                    return number, holder, copy
            if say != said:
                log(say)
                said, begin = say, time.monotonic()
            time.sleep(_LOOK)

    def _lock_copy(self) -> str:
        """Tries to lock the local copy; returns what names it, and an empty text without a lock."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
        self._lock.seek(0)
        if copy := self._lock.read():
            return copy
        self._lock.write(secrets.token_hex(8))
        self._lock.flush()
        return self._lock_copy()

    def _renew(self) -> None:
        while not self._end.wait(_RENEWAL):
            begin = _now()
            try:
                self._write(turn=self._own["turn"] + 1)
                newest, holder = _newest(self._store)
            except UserError:
                continue
            if newest == self._number:
                self._renewed = begin
            elif holder:
                self.lost = _describe(holder)
                return

    def _write(self, **changes: object) -> None:
        self._own |= changes
        self._store.write(_name(self._number), json.dumps(self._own).encode())


def _now() -> float:
    """Returns the time of a clock that also runs while the machine is suspended, in seconds."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _describe(holder: Holder) -> str:
    return f"process {holder['pid']} on host {holder['host']}"


def _name(number: int) -> str:
    return f".lease/{number:06d}.json"


def _numbers(store: Store) -> list[int]:
    names = (re.fullmatch(r"\.lease/(\d+)\.json", name) for name in store.list(".lease"))
    return sorted(int(match[1]) for match in names if match)


def _newest(store: Store) -> tuple[int, Holder]:
    """Returns the number and content of the newest lease; 0 and an empty one if there is none."""
    while numbers := _numbers(store):
        name = _name(numbers[-1])
        if (content := store.read(name)) is None:  # deleted since: there are newer ones
            continue
        with contextlib.suppress(ValueError):
            found = json.loads(content)
            if isinstance(found, dict) and found.keys() >= _FIELDS:
                return numbers[-1], found
        raise UserError(
            f"{store.url_of(name)} is damaged, so that nobody can know who has the run. Delete it "
            "if no process uses the run, or choose another --workdir"
        )
    return 0, {}
