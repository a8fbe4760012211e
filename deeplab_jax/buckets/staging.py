"""Copies what a bucket holds to a cache on this machine, so that readers work with local files."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from rich.filesize import decimal

from deeplab_jax.buckets.checkpoints import MARKER, Sums, checkpoint_of, marked_files
from deeplab_jax.buckets.store import NUM_THREADS, Entry, Store, Unreachable, check_address
from deeplab_jax.utils.download import file_digest
from deeplab_jax.utils.errors import UserError, listed, print_warning
from deeplab_jax.utils.files import atomic_path, lock_folder, require_writable
from deeplab_jax.utils.paths import user_cache
from deeplab_jax.utils.progress import parallel_map

_PAUSES = (0.0, 1.0, 2.0, 4.0)  # seconds before each try to read a file
_MANY_BYTES, _MANY_FILES = 20_000_000, 100  # from which on copying is shown
_STALE = 3600.0  # seconds after which a partial file is that of a killed process
# Names that cannot be files below a folder, or are those of `stage` itself.
_NO_FILE = re.compile(rb"^/|//|/$|(^|/)(\.\.?|\.staging-[^/]*|[^/]{256,})(/|$)|\0|.{2001}", re.S)
_MODEL = "a model is read from local files"

Wanted = Callable[[str], bool]


def local_path(url: str) -> pathlib.Path:
    """Returns where an address is copied to: `user_cache()/deeplab_jax/buckets/gs/BUCKET/PATH`."""
    return user_cache() / "deeplab_jax" / "buckets" / check_address(url).replace("://", "/")


def stage(
    url: str, wanted: Wanted | None = None, *, title: str, into: pathlib.Path | None = None
) -> pathlib.Path:
    """Copies the objects below an address to this machine, and returns their folder or file.

    Files that are there and unchanged are not read again, even after a process that was killed.
    Files that are gone from the bucket are deleted. A folder `checkpoints/N` without its marker
    counts as gone. Processes that copy the same address wait for each other.

    Args:
      url: address of a folder or an object.
      wanted: which objects to copy and which files to delete, by the name below the address. The
        name is empty for an object at the address itself. Default: all.
      title: what it is or what it is for, for a message.
      into: the folder. Default: `local_path(url)`.

    Raises:
      UserError: nothing is at the address; objects have names that cannot be files, or cannot be
        read; or the disk is too small or not writable.
    """
    url = check_address(url)
    cache, folder = local_path("/".join(url.split("/")[:3])), into or local_path(url)
    try:
        require_writable(cache, create=True)
    except UserError as error:
        raise UserError(f"{error}. Set XDG_CACHE_HOME to a folder that can be written to") from None
    state = ".staging-" + hashlib.sha256(f"{url} {into}".encode()).hexdigest()[:16]
    copy = _Copy(url, wanted or (lambda name: True), folder, cache / f"{state}.index")
    with lock_folder(cache, state, f"{url}: waiting for another process that copies it"):
        for _ in range(3):
            if copy.update(title):
                return folder
    raise UserError(f"{url}: objects are deleted while they are read. Run the command again")


def stage_model(url: str) -> pathlib.Path:
    """Copies what reading a model needs, and returns its local path.

    Of a workdir or its folder checkpoints/, these are small files without the models' arrays, which
    are copied with the folder of one checkpoint. With a checkpoint goes the config.json of its run.

    Args:
      url: of a weights file, a folder as on the hub, a checkpoint, its folder, or a workdir.

    Raises:
      UserError: there is no model; or as `stage`.
    """
    url = check_address(url)
    names = Store(url).list()
    if any(re.match(r"checkpoints/\d+/", name) for name in names):
        return _stage_run(url, url, r"checkpoints/\d+/(?!model/|training/)")
    if match := re.fullmatch(r"(.+)/checkpoints(?:/(\d+))?", url):
        part = rf"{match[2]}/(?!training/)" if match[2] else r"\d+/(?!model/|training/)"
        return _stage_run(url, match[1], f"checkpoints/{part}")
    parent, _, file = url.rpartition("/")
    if "" in names:
        if re.match(r"(model|pytorch_model)\b", file):  # as on the hub: config and shards beside it
            beside = re.compile(rf"{re.escape(file)}|[^/]*\.json|[^/]*-of-[^/]*")
            stage(parent, lambda name: bool(beside.fullmatch(name)), title=_MODEL)
            return local_path(url)
        return stage(url, title=_MODEL)
    if any(name.startswith("info/") for name in names):
        if MARKER not in names:
            raise UserError(_incomplete(url))
        return stage(url, lambda name: not name.startswith("training/"), title=_MODEL)
    if any(re.fullmatch(r"[^/]+\.(safetensors|bin)", name) for name in names):
        return stage(url, lambda name: "/" not in name, title=_MODEL)
    held = f"It holds {listed(sorted({name.partition('/')[0] for name in names}))}"
    raise UserError(
        f"no model at {url}: expected a workdir, a checkpoint's folder in it, a weights file, or a "
        f"folder as on the hub. {held if names else 'Nothing is there'}"
    )


def _stage_run(url: str, run: str, parts: str) -> pathlib.Path:
    """Copies a run's own JSON files and the files of checkpoints whose names begin with `parts`."""
    pattern = re.compile(rf"[^/]*\.jsonl?|{parts}.*")
    stage(run, lambda name: bool(pattern.fullmatch(name)), title=_MODEL)
    path = local_path(url)
    if not (path / "checkpoints" if url == run else path).is_dir():
        raise UserError(_incomplete(url))
    return path


def _incomplete(url: str) -> str:
    return (
        f"no complete checkpoint at {url}: a checkpoint in a bucket counts once it holds all files "
        f"that its {MARKER} lists, which is written last"
    )


class _Copy:
    """A local copy of the objects below an address."""

    def __init__(self, url: str, wanted: Wanted, folder: pathlib.Path, index: pathlib.Path) -> None:
        """Copies nothing yet.

        Args:
          url, wanted: see `stage`.
          folder: of the copy; the file, if the address is that of an object.
          index: a file that records the tag and time of each copied file, as one JSON a line.
        """
        self._store, self._wanted, self._folder, self._index = Store(url), wanted, folder, index

    def update(self, title: str) -> bool:
        """Copies, see `stage`; returns false if an object was deleted after it was listed."""
        url, listing = self._store.url, self._store.list()
        if not listing:
            raise UserError(f"{url}: nothing is there. Check the address")
        found = {name: entry for name, entry in listing.items() if self._wanted(name)}
        marked, incomplete = self._read_markers(listing, set(map(checkpoint_of, found)) - {""})
        found = {n: entry for n, entry in found.items() if checkpoint_of(n) not in incomplete}
        _check_names(url, found)
        self._remove_others(found, set(map(checkpoint_of, listing)) - incomplete)
        needed = self._outdated(found)
        total = sum(found[name].size for name in needed)
        self._require_space(total)
        is_long = total >= _MANY_BYTES or len(needed) >= _MANY_FILES
        if is_long:
            files = "1 file" if len(needed) == 1 else f"{len(needed):,} files"
            where = f"copied to {self._folder}: {title}"
            print(f"{url}: {files}, {decimal(total)}, {where}", file=sys.stderr, flush=True)
        is_gone, has_failed = threading.Event(), threading.Event()

        def copy(name: str) -> str | None:
            """Returns why an object was not copied; empty if because another could not be."""
            problem, entry = "", found[name]
            for pause in _PAUSES:
                if has_failed.wait(pause) or has_failed.is_set():
                    return ""
                try:
                    if problem:  # it may have changed since it was listed
                        entry = self._store.list(name)[name]
                    self._download(name, entry, marked.get(name))
                    return None
                except (FileNotFoundError, KeyError):
                    is_gone.set()
                    return None
                except (Unreachable, OSError) as error:
                    problem = str(error)
            has_failed.set()
            return problem

        tasks = parallel_map(copy, needed, "Copying", num_threads=NUM_THREADS, quiet=not is_long)
        problems = [problem for problem in tasks if problem is not None]
        if problems:
            raise UserError(
                f"{url}: {len(problems)} of {len(needed)} files could not be read: "
                f"{max(problems)}. Run the same command again: it goes on with the rest"
            )
        if "" not in listing:
            self._folder.mkdir(parents=True, exist_ok=True)
        return not is_gone.is_set()

    def _read_markers(
        self, listing: Mapping[str, Entry], checkpoints: Iterable[str]
    ) -> tuple[dict[str, Sums | None], set[str]]:
        """Returns what markers say about files, and the checkpoints that are not complete."""
        marked, incomplete = dict[str, Sums | None](), set[str]()
        for checkpoint in checkpoints:
            content = self._store.read(f"{checkpoint}/{MARKER}")
            files = marked_files(checkpoint, content or b"", listing)
            damaged = [
                name
                for name, sums in files.items()
                if name not in listing or (sums and listing[name].size != sums[0])
            ]
            if content is None or damaged:
                incomplete.add(checkpoint)
            if content is not None and damaged:
                print_warning(
                    f"{self._store.url_of(checkpoint)} is left out: {listed(damaged)} is gone or "
                    f"has another size than {MARKER} says"
                )
            marked |= files
        return marked, incomplete

    def _remove_others(self, found: Collection[str], checkpoints: Collection[str]) -> None:
        """Deletes local files that are wanted but not found, and files of other checkpoints."""
        if "" not in found and self._folder.is_file():
            self._folder.unlink()
        for parent, _, files in os.walk(self._folder, topdown=False):
            for path in (pathlib.Path(parent, file) for file in files):
                name = path.relative_to(self._folder).as_posix()
                if path.name.startswith(".") and path.suffix == ".partial":
                    is_old = path.stat().st_mtime < time.time() - _STALE
                elif path.name.startswith(".staging-"):  # of `stage`, in the folder of a bucket
                    is_old = False
                else:
                    checkpoint = checkpoint_of(name)
                    is_gone = bool(checkpoint) and checkpoint not in checkpoints
                    is_old = name not in found and (is_gone or self._wanted(name))
                if is_old:
                    path.unlink(missing_ok=True)
            if not os.listdir(parent):
                os.rmdir(parent)

    def _outdated(self, found: Mapping[str, Entry]) -> list[str]:
        """Returns which objects are not there as local files."""
        recorded = {}
        for line in self._index.read_text().splitlines() if self._index.exists() else ():
            try:
                name, tag, time_ns = json.loads(line)
                recorded[name] = (tag, time_ns)
            except ValueError:  # an empty line, or one that a kill cut short
                continue

        def is_there(name: str) -> bool:
            path, entry = self._folder / name, found[name]
            try:
                status = path.lstat()
                if not path.is_file() or status.st_size != entry.size:
                    return False
                if recorded.get(name) == (entry.tag, status.st_mtime_ns):
                    return True
                if not entry.md5 or file_digest(path, "md5") != entry.md5:
                    return False
                os.utime(path, ns=(entry.time_ns, entry.time_ns))
            except OSError:
                return False
            self._record(name, entry)
            return True

        with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
            there = pool.map(is_there, found)
            return [name for name, is_current in zip(found, there, strict=True) if not is_current]

    def _require_space(self, needed: int) -> None:
        folder = self._folder.absolute()
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise UserError(
                f"{self._store.url}: {decimal(needed)} are needed in {self._folder}, where "
                f"{decimal(free)} are free. Free space there, or set XDG_CACHE_HOME to a folder on "
                "another disk"
            )

    def _download(self, name: str, entry: Entry, sums: Sums | None) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            self._store.download(name, partial, entry)
            if sums and file_digest(partial, "sha256") != sums[1]:
                raise UserError(
                    f"{self._store.url_of(name)} is damaged: its SHA-256 is not the one in the "
                    f"checkpoint's {MARKER}. Use another checkpoint"
                )
            os.utime(partial, ns=(entry.time_ns, entry.time_ns))
        self._record(name, entry)

    def _record(self, name: str, entry: Entry) -> None:
        with self._index.open("ab", buffering=0) as file:  # one write, also beside other threads'
            file.write(f"\n{json.dumps([name, entry.tag, entry.time_ns])}".encode())


def _check_names(url: str, names: Collection[str]) -> None:
    """Raises UserError if objects cannot be files in one folder."""
    paths = [pathlib.PurePosixPath(name) for name in names if name]
    folders = {str(parent) for path in paths for parent in path.parents}
    wrong = [n for n in names if _NO_FILE.search(n.encode()) or (n or ".") in folders]
    if wrong:
        raise UserError(
            f"{url}: cannot be copied, because these names cannot be files beside the others: "
            f"{listed([ascii(name) for name in wrong])}"
        )
