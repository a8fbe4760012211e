"""Copies what a bucket holds to a cache on this machine, so that readers work with local files."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from rich.filesize import decimal

from deeplab_jax.buckets.checkpoints import MARKER, Sums, checkpoint_of, marked_files
from deeplab_jax.buckets.store import NUM_THREADS, Entry, Store, Unreachable, check_address
from deeplab_jax.utils.download import file_digest
from deeplab_jax.utils.errors import UserError, listed
from deeplab_jax.utils.files import atomic_path, lock_folder, require_writable
from deeplab_jax.utils.paths import user_cache
from deeplab_jax.utils.progress import parallel_map

_PAUSES = (0.0, 1.0, 2.0, 4.0)  # seconds before each attempt
_MANY_BYTES, _MANY_FILES = 20_000_000, 100  # from which on copying is shown
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
    cache, folder = user_cache() / "deeplab_jax" / "buckets", into or local_path(url)
    try:
        require_writable(cache, create=True)
    except UserError as error:
        raise UserError(f"{error}. Set XDG_CACHE_HOME to a folder that can be written to") from None
    store, lock = Store(url), hashlib.sha256(f"{url} {into}".encode()).hexdigest()[:16]
    with lock_folder(cache, f".{lock}.lock", f"{url}: waiting for another process that copies it"):
        for pause in _PAUSES:
            time.sleep(pause)
            problems = _copy(store, wanted or (lambda name: True), folder, title)
            if not problems:
                return folder
    raise UserError(
        f"{url}: {len(problems)} files could not be read: {max(problems)}. Run the same command "
        "again: it goes on with the rest"
    )


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


def _copy(store: Store, wanted: Wanted, folder: pathlib.Path, title: str) -> list[str]:
    """Copies what is missing in a folder, see `stage`; returns why some files were not copied."""
    url, listing = store.url, store.list()
    if not listing:
        raise UserError(f"{url}: nothing is there. Check the address")
    found = {name: entry for name, entry in listing.items() if wanted(name)}
    marked, incomplete = _read_markers(store, listing, set(map(checkpoint_of, found)) - {""})
    found = {name: found[name] for name in found if checkpoint_of(name) not in incomplete}
    _check_names(url, found)
    _remove_others(folder, wanted, found, set(map(checkpoint_of, listing)) - incomplete)
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        is_there = pool.map(lambda name: _is_current(folder / name, found[name]), found)
        needed = [name for name, is_current in zip(found, is_there, strict=True) if not is_current]
    total = sum(found[name].size for name in needed)
    _require_space(url, folder, total)
    is_long = total >= _MANY_BYTES or len(needed) >= _MANY_FILES
    if is_long:
        files = "1 file" if len(needed) == 1 else f"{len(needed):,} files"
        where = f"copied to {folder}: {title}"
        print(f"{url}: {files}, {decimal(total)}, {where}", file=sys.stderr, flush=True)
    failed = list[str]()

    def copy(name: str) -> str | None:
        """Returns why an object was not copied; empty if because many others could not be."""
        if len(failed) >= NUM_THREADS:
            return ""
        try:
            _download(store, name, folder / name, found[name], marked.get(name))
            return None
        except (Unreachable, OSError) as error:  # also if it is gone or changed since it was listed
            failed.append(name)
            return str(error)

    tasks = parallel_map(copy, needed, "Copying", num_threads=NUM_THREADS, quiet=not is_long)
    problems = [problem for problem in tasks if problem is not None]
    if "" not in listing:
        folder.mkdir(parents=True, exist_ok=True)
    return problems


def _read_markers(
    store: Store, listing: Mapping[str, Entry], checkpoints: Iterable[str]
) -> tuple[dict[str, Sums | None], set[str]]:
    """Returns what markers say about files, and the checkpoints that are not complete."""
    marked, incomplete = dict[str, Sums | None](), set[str]()
    for checkpoint in checkpoints:
        content = store.read(f"{checkpoint}/{MARKER}")
        files = marked_files(checkpoint, content or b"", listing)
        if content is None or any(
            name not in listing or (sums and listing[name].size != sums[0])
            for name, sums in files.items()
        ):
            incomplete.add(checkpoint)
        marked |= files
    return marked, incomplete


def _remove_others(
    folder: pathlib.Path, wanted: Wanted, found: Collection[str], checkpoints: Collection[str]
) -> None:
    """Deletes local files that are wanted but not found, and files of other checkpoints."""
    if "" not in found and folder.is_file():
        folder.unlink()
    for parent, _, files in os.walk(folder, topdown=False):
        for path in (pathlib.Path(parent, file) for file in files):
            name = path.relative_to(folder).as_posix()
            checkpoint = checkpoint_of(name)
            is_gone = bool(checkpoint) and checkpoint not in checkpoints
            if name not in found and (is_gone or wanted(name)):
                path.unlink(missing_ok=True)
        if not os.listdir(parent):
            os.rmdir(parent)


def _is_current(path: pathlib.Path, entry: Entry) -> bool:
    """Whether a local file is an object: it has its size, and its time or its MD5."""
    try:
        status = path.lstat()
        if not path.is_file() or status.st_size != entry.size:
            return False
        if status.st_mtime_ns == entry.time_ns:
            return True
        if not entry.md5 or file_digest(path, "md5") != entry.md5:
            return False
        os.utime(path, ns=(entry.time_ns, entry.time_ns))
        return True
    except OSError:
        return False


def _require_space(url: str, folder: pathlib.Path, needed: int) -> None:
    absolute = folder.absolute()
    existing = next(each for each in (absolute, *absolute.parents) if each.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{url}: {decimal(needed)} are needed in {folder}, where {decimal(free)} are free. "
            "Free space there, or set XDG_CACHE_HOME to a folder on another disk"
        )


def _download(store: Store, name: str, path: pathlib.Path, entry: Entry, sums: Sums | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        store.download(name, partial, entry)
        if sums and file_digest(partial, "sha256") != sums[1]:
            raise UserError(
                f"{store.url_of(name)} is damaged: its SHA-256 is not the one in the checkpoint's "
                f"{MARKER}. Use another checkpoint"
            )
        os.utime(partial, ns=(entry.time_ns, entry.time_ns))


def _check_names(url: str, names: Collection[str]) -> None:
    """Raises UserError if objects cannot be files in one folder."""
    folders = {
        str(place) for name in names if name for place in pathlib.PurePosixPath(name).parents
    }

    def is_file(name: str) -> bool:
        parts = name.split("/") if name else []
        are_names = all(
            part not in ("", ".", "..") and "\0" not in part and len(part.encode()) <= 255
            for part in parts
        )
        return are_names and (name or ".") not in folders

    wrong = [ascii(name) for name in names if not is_file(name)]
    if wrong:
        raise UserError(
            f"{url}: cannot be copied, because these names cannot be files beside the others: "
            f"{listed(wrong)}"
        )
