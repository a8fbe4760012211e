"""A run whose workdir is in a bucket: its local copy, the lease, and the mirror."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator

from deeplab_jax.buckets import staging
from deeplab_jax.buckets.checkpoints import MARKER, checkpoint_of
from deeplab_jax.buckets.lease import Lease
from deeplab_jax.buckets.mirror import BucketLost, Mirror
from deeplab_jax.buckets.store import Store, Unreachable
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import lock_folder, require_writable
from deeplab_jax.utils.paths import user_cache

# What a run reads besides its checkpoints.
_READ = re.compile(r"(?:stage1/)?[^/]*\.jsonl?")


class BucketRun:
    """The local copy of a run in a bucket.

    Each process has its own. That of process 0 is mirrored to the bucket. The files of a run are
    those of a workdir: other objects below its address, such as another run, are left alone.

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
        # Its own folder, so that the copy of a run at `address/name` is not in it.
        folder = user_cache() / "deeplab_jax" / "runs" / self.address.replace("://", "/")
        self.path = folder / f"process-{process}"
        self._patience, self._log = patience, log
        self._mirror: Mirror | None = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Takes the run, updates its local copy and mirrors it; for process 0.

        At the end all is in the bucket, and the local copy is deleted. If the bucket cannot be
        reached any longer, the local copy stays, and the next run on this machine goes on from it.

        Raises:
          UserError: another process has the run, or the bucket cannot be written.
          Unreachable: the bucket cannot be reached at the start.
          BucketLost: the bucket did not answer for `patience` seconds.
        """
        self._log(f"workdir {self.address}, local copy {self.path}")
        try:
            require_writable(self.path, create=True)
        except UserError as error:
            raise UserError(f"{error}. Set XDG_CACHE_HOME to a folder with room") from None
        self._store.check_writable()
        self._check_markers()
        with (
            Lease.take(self._store, self.path, self._log) as lease,
            # Hosts may share a cache; one that has lost the lease may not have noticed yet.
            lock_folder(self.path, ".lock", f"{self.path}: waiting for the process that has it"),
        ):
            if lease.is_copy_complete:
                self._log(f"{self.address}: going on from the local copy {self.path}")
            else:
                self.update()
                lease.mark_complete()
            self._mirror = Mirror(
                *(self._store, self.path),
                patience=self._patience,
                log=self._log,
                check=lease.confirm,
            )
            try:
                with self._mirror:
                    yield
            finally:
                if self._mirror.is_whole:
                    lease.unmark_complete()
                    self.delete()

    def _check_markers(self) -> None:
        """Refuses a bucket whose checkpoints are not marked: the mirror would delete them.

        Raises:
          UserError: no checkpoint is marked, and none can be of an earlier attempt: there is no
            lease.
        """
        names = self._store.list()
        files = [name for name in names if checkpoint_of(name) or name.startswith(".lease/")]
        if files and not any(name.startswith(".lease/") or name.endswith(MARKER) for name in files):
            raise UserError(
                f"{self.address} holds checkpoints without {MARKER}, which marks those that are "
                "complete. Copy the run there again, with all its files, or choose another "
                "--workdir"
            )

    def update(self) -> None:
        """Makes the local copy what the bucket has, without what a run never reads."""
        self.path.mkdir(parents=True, exist_ok=True)
        for child in self.path.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif not child.name.startswith("."):
                child.unlink()
        if self._store.list():
            staging.stage(
                self.address,
                lambda name: bool(checkpoint_of(name) or _READ.fullmatch(name)),
                title="the run goes on from there",
                into=self.path,
            )

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
        try:
            if self._mirror is not None:
                self._mirror.check()
        except BucketLost:
            return True
        return False

    def exists(self, path: pathlib.Path) -> bool:
        """Whether the run is known to have written a file, here or in an earlier attempt."""
        try:
            return path.exists() or bool(self._store.list(path.relative_to(self.path).as_posix()))
        except Unreachable:
            return False

    def shown(self, path: pathlib.Path) -> str:
        """Returns the address of a file or folder of the local copy."""
        return self._store.url_of("/".join(path.relative_to(self.path).parts))

    def delete(self) -> None:
        """Deletes the local copy."""
        shutil.rmtree(self.path, ignore_errors=True)
