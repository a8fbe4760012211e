"""The lock of a run in a bucket: a numbered object, which its holder renews.

`.lease/000007.json` names a holder. The highest number has the run, and creating the next number
takes it: only one process can create an object. A process that was killed does not renew, which
others measure by their own clocks; clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
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
from deeplab_jax.utils.files import write_bytes

_RENEWAL = 10.0  # seconds
_WATCH = 30.0  # seconds without a renewal after which a holder counts as dead
_LOOK = 2.0  # seconds between two looks at its lease
_JOIN = 5.0  # seconds that a renewal in progress may delay a release

# In a local copy that had all that the bucket had; names the copy as its lease does.
_COMPLETE = ".complete"

_held: set[str] = set()  # nonces of this process's leases

Holder = dict[str, Any]  # content of a lease
_FIELDS = {"pid", "started", "host", "boot", "copy", "nonce", "turn", "ended"}


class Lease:
    """The lease of a run, renewed by a thread until it is released.

    Attributes:
      lost: process and host of the new holder if another process took the run over, else empty.
    """

    @classmethod
    def take(cls, store: Store, folder: pathlib.Path, log: Callable[[str], None]) -> Lease:
        """Takes a run.

        Args:
          store: of the run.
          folder: local copy of the run.
          log: prints a line.

        Raises:
          UserError: another process has the run; the message names it.
          Unreachable: the bucket cannot be reached.
        """
        own = _new_holder()
        mark = folder / _COMPLETE
        _held.add(own["nonce"])  # before other threads can see the lease
        try:
            while True:
                numbers = _numbers(store)
                before = _read(store, numbers[-1]) if numbers else {}
                if before is None:  # deleted since: there are newer ones
                    continue
                number = max(numbers, default=0) + 1
                if before:
                    _wait_until_free(store, number - 1, before, log)
                if mark.exists() and mark.read_text() == before.get("copy"):
                    own["copy"] = before["copy"]
                else:  # until `mark_complete`, which a kill may prevent
                    mark.unlink(missing_ok=True)
                    own["copy"] = own["nonce"]
                begin = _now()
                # The answer to an earlier attempt may be lost: then the object is there.
                created = store.create(_name(number), json.dumps(own).encode())
                found = own if created else _read(store, number)
                # Meanwhile others may have taken later numbers and deleted this one.
                if found and found["nonce"] == own["nonce"] and _numbers(store)[-1] == number:
                    store.delete(_name(old) for old in numbers if old < number - 1)
                    return cls(store, number, own, mark, begin)
        except BaseException:
            _held.discard(own["nonce"])
            raise

    def __init__(
        self, store: Store, number: int, own: Holder, mark: pathlib.Path, renewed: float
    ) -> None:
        self.lost = ""
        self._store, self._number, self._own, self._mark = store, number, own, mark
        self._renewed = renewed  # by `_now`, a moment before the last renewal
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_copy_complete(self) -> bool:
        """Whether the local copy has all that the bucket has: nobody wrote to the bucket since."""
        return self._mark.exists() and self._mark.read_text() == self._own["copy"]

    def mark_complete(self) -> None:
        """Records that the local copy has all that the bucket has."""
        write_bytes(self._mark, self._own["copy"].encode())

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
        _held.discard(self._own["nonce"])
        with contextlib.suppress(UserError):  # the next process waits until it counts as dead
            self.confirm()
            if not self._thread.is_alive():
                self._write(ended=True)

    def _renew(self) -> None:
        while not self._end.wait(_RENEWAL):
            begin = _now()
            try:
                self._write(turn=self._own["turn"] + 1)
                newest = _numbers(self._store)[-1]
                holder = _read(self._store, newest)
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


def _new_holder() -> Holder:
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "boot": _boot(),
        "nonce": secrets.token_hex(8),
        "turn": 0,
        "ended": False,
    }


def _wait_until_free(store: Store, number: int, holder: Holder, log: Callable[[str], None]) -> None:
    """Returns once a lease has ended or its holder counts as dead; raises UserError if it runs."""
    in_use = f"{store.url} is in use by {_describe(holder)}"
    if holder["ended"]:
        return
    refused = UserError(f"{in_use}: wait for it or stop it, or choose another --workdir")
    if holder["host"] == socket.gethostname() and holder["boot"] == _boot() != "":
        if _runs(holder):
            raise refused
        return
    log(f"{in_use}, or was: watching for {_WATCH:.0f} s whether that process still runs")
    begin = time.monotonic()
    while time.monotonic() - begin < _WATCH:
        time.sleep(_LOOK)
        now = _read(store, number)
        if not now or now["ended"]:
            return
        if now["turn"] != holder["turn"]:
            raise refused


def _runs(holder: Holder) -> bool:
    if holder["pid"] == os.getpid():
        return holder["nonce"] in _held
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs as another user
    return _started(holder["pid"]) in ("", holder["started"])  # another may have its id now


def _started(pid: int) -> str:
    """Returns when a process started, in ticks since the boot; empty if it cannot be seen."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def _now() -> float:
    """Returns the time of a clock that also runs while the machine is suspended, in seconds."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _boot() -> str:
    """Identifies a start of the system, and a container: process ids differ between containers."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _describe(holder: Holder) -> str:
    return f"process {holder['pid']} on host {holder['host']}"


def _name(number: int) -> str:
    return f".lease/{number:06d}.json"


def _numbers(store: Store) -> list[int]:
    names = (re.fullmatch(r"\.lease/(\d+)\.json", name) for name in store.list(".lease"))
    return sorted(int(match[1]) for match in names if match)


def _read(store: Store, number: int) -> Holder | None:
    """Returns the content of a lease; None if there is no such lease."""
    content = store.read(_name(number))
    if content is None:
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict) and found.keys() >= _FIELDS and isinstance(found["pid"], int):
            return found
    raise UserError(
        f"{store.url_of(_name(number))} is damaged, so that nobody can know who has the run. "
        "Delete it if no process uses the run, or choose another --workdir"
    )
