"""A run whose workdir is in a bucket: its local copy, the lease, and the mirror."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator

from deeplab_jax.buckets import staging
from deeplab_jax.buckets.lease import Lease
from deeplab_jax.buckets.mirror import BucketLost, Mirror
from deeplab_jax.buckets.outputs import MARKER
from deeplab_jax.buckets.store import Store
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import user_cache

# In a local copy that has all that the bucket had when its lease was taken.
_COMPLETE = ".complete"
# What a run never reads: leases, TensorBoard's events, pictures.
_NOT_READ = re.compile(r"\.|(.+/)?(tensorboard|pictures)/")


class BucketRun:
    """The local copy of a run in a bucket.

    Each process has its own. That of process 0 is mirrored to the bucket.

    Attributes:
      address: of the run in the bucket.
      path: folder of the local copy.
      is_copied: whether each process has its own folder.
    """

    is_copied = True

    def __init__(
        self, url: str, *, process: int, patience: float, log: Callable[[str], None]
    ) -> None:
        """Opens nothing yet.

        Args:
          url: of the run.
          process: index of this process.
          patience: seconds without the bucket after which the run ends.
          log: prints a line.

        Raises:
          UserError: the address is malformed, or a package is missing.
        """
        self._store = Store(url)
        self.address = self._store.url
        folder = user_cache() / "deeplab_jax" / "runs" / self.address.replace("://", "/")
        self.path = folder.with_name(f"{folder.name}.process-{process}") if process else folder
        self._patience, self._log = patience, log
        self._lease: Lease | None = None
        self._mirror: Mirror | None = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Takes the run, updates its local copy and mirrors it; for process 0.

        At the end all is in the bucket, and the local copy is deleted. If the bucket cannot be
        reached any longer, the local copy stays, and the next run on this machine goes on from it.

        Raises:
          UserError: another process has the run, or the bucket cannot be written.
          BucketLost: the bucket did not answer for `patience` seconds.
        """
        self._store.check_writable()
        self.path.mkdir(parents=True, exist_ok=True)
        complete = self.path / _COMPLETE
        was_complete = complete.exists()
        complete.unlink(missing_ok=True)  # until it is known who had the run last
        with Lease.take(self._store, self.path, self._log) as self._lease:
            if self._lease.is_own_copy and was_complete:
                self._log(f"{self.address}: going on from the local copy {self.path}")
                complete.touch()
            else:
                if self._lease.is_first:
                    self._check_markers()
                self.update()
            self._mirror = Mirror(
                self._store,
                self.path,
                patience=self._patience,
                log=self._log,
                check=self._lease.confirm,
            )
            try:
                with self._mirror:
                    yield
            finally:
                if self._mirror.is_whole:
                    self.delete()

    def _check_markers(self) -> None:
        """Refuses a bucket whose checkpoints are not marked: the mirror would delete them.

        Raises:
          UserError: no checkpoint is marked, and none can be of an earlier attempt.
        """
        files = [name for name in self._store.list() if "checkpoints/" in name]
        if files and not any(name.endswith(f"/{MARKER}") for name in files):
            raise UserError(
                f"{self.address} holds checkpoints without {MARKER}, which marks those that are "
                "complete. Copy the run there again, with all its files, or choose another "
                "--workdir"
            )

    def update(self) -> None:
        """Makes the local copy what the bucket has, without what a run never reads."""
        (self.path / _COMPLETE).unlink(missing_ok=True)
        for child in self.path.iterdir() if self.path.exists() else ():
            if child.is_dir():
                shutil.rmtree(child)
            elif not child.name.startswith("."):
                child.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        if self._store.list():
            staging.stage(
                self.address,
                lambda name: not _NOT_READ.match(name),
                title="the run goes on from there",
                into=self.path,
            )
        (self.path / _COMPLETE).touch()

    def flush(self) -> None:
        """Waits until all that is local is in the bucket."""
        if self._mirror is not None:
            self._mirror.flush()

    @property
    def is_failing(self) -> bool:
        """Whether the bucket did not answer for too long; the end of `hold` then raises.

        Raises:
          UserError: another process has taken the run over.
        """
        if self._lease is None or self._mirror is None:
            return False
        self._lease.check()
        try:
            self._mirror.check()
        except BucketLost:
            return True
        return False

    def exists(self, path: pathlib.Path) -> bool:
        """Whether the run has written a file, here or in an earlier attempt."""
        name = path.relative_to(self.path).as_posix()
        return path.exists() or bool(self._store.list(name))

    def shown(self, path: pathlib.Path) -> str:
        """Returns the address of a file or folder of the local copy."""
        return self._store.url_of("/".join(path.relative_to(self.path).parts))

    def delete(self) -> None:
        """Deletes the local copy."""
        shutil.rmtree(self.path, ignore_errors=True)
