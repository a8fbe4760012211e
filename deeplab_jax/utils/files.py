"""Searches in folders of users, atomic file writes, and pictures that name their origin."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import glob
import os
import pathlib
import struct
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from deeplab_jax.utils.errors import UserError

# What systems and network storage add to folders, lower case, besides names that begin with a dot.
_SYSTEM_NAMES = frozenset(
    (
        *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot"),
        *("$recycle.bin", "system volume information", "lost+found", "__macosx", "__pycache__"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    )
)
_ORIGIN = b"Software\0deeplab_jax"  # the text chunk of pictures


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or made by the system or network storage."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def find_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Finds the files below a folder, except for pipes, hidden ones and those in hidden folders.

    Links to folders are followed. If several paths lead to one folder, only the first is used;
    paths without links come first. Links to folders that contain them are not followed.

    Returns:
      The files in the order of `os.walk` with sorted names: those of a folder, then of subfolders.
    """
    found: dict[tuple[str, ...], list[pathlib.Path]] = {}  # by the parts of the folder
    seen: set[str] = set()
    folders, links = [(folder, os.path.realpath(folder))], list[tuple[pathlib.Path, str]]()
    while folders or links:
        path, real = folders.pop() if folders else links.pop(0)
        if real in seen:
            continue
        seen.add(real)
        files = found[path.parts] = []
        try:
            with os.scandir(path) as entries:
                visible = [entry for entry in entries if not is_hidden(entry.name)]
        except OSError as error:
            raise UserError(f"{path}: the folder cannot be read ({error.strerror})") from None
        for entry in sorted(visible, key=lambda entry: entry.name):
            child = path / entry.name
            if not _is_folder(entry):
                if entry.is_symlink() or entry.is_file():  # no pipe, which would never end
                    files.append(child)
            elif not entry.is_symlink():
                folders.append((child, os.path.join(real, entry.name)))
            elif not pathlib.PurePath(real).is_relative_to(target := os.path.realpath(child)):
                links.append((child, target))
    return [file for _, files in sorted(found.items()) for file in files]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, which is reported when it is read
        return False


def match_files(pattern: str) -> list[pathlib.Path]:
    """Finds the files that a shell pattern matches, sorted; `**` is any subfolder of `find_files`.

    Hidden files and folders match only where the pattern has their dot or name.
    """
    parts = pathlib.PurePath(pattern).parts
    depth = parts.index("**") if "**" in parts else len(parts)
    matched = sorted(glob.glob(os.path.join(*parts[:depth]))) if depth else ["."]
    shown = [
        path
        for path in map(pathlib.Path, matched)
        if all(
            not is_hidden(name) or not glob.has_magic(part) or part.startswith(".")
            for name, part in zip(path.parts, parts, strict=False)
        )
    ]
    if depth == len(parts):
        return [path for path in shown if path.is_file()]
    return [
        file
        for top in shown
        if top.is_dir()
        for file in sorted(find_files(top))
        if _matches(file.relative_to(top).parts, parts[depth:])
    ]


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts or not names:
        return not names and set(parts) <= {"**"}
    if parts[0] == "**":
        return _matches(names, parts[1:]) or _matches(names[1:], parts)
    return fnmatch.fnmatch(names[0], parts[0]) and _matches(names[1:], parts[1:])


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path next to `path`, and renames the file there to `path` on success.

    An existing `path` is replaced. If the block raises, the temporary file is deleted and `path`
    stays as it was.
    """
    # A random name, because two processes may write the same file at once.
    # The name is cut, because file systems limit it to 255 bytes.
    partial = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder next to `path`, and renames it to `path` on success.

    `path` must not exist, or be an empty folder. Its parents are created. If the block raises, the
    temporary folder is deleted, and `path` stays as it was.
    """
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:40]}."
    with tempfile.TemporaryDirectory(".partial", prefix, path.parent) as scratch:
        partial = pathlib.Path(scratch) / path.name  # `scratch` is not readable to others
        partial.mkdir()
        yield partial
        os.replace(partial, path)


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path, name: str = "lock", waiting: str = "") -> Iterator[None]:
    """Creates and locks a folder; waits for other processes. A killed process's lock is freed.

    Args:
      folder: to lock.
      name: of the lock's file in it; locks of different names are independent.
      waiting: printed to stderr when the lock is not free after two seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a") as file:
        for _ in range(20):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def write_png(
    path: pathlib.Path,
    image: UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w"],
    palette: UInt8[np.ndarray, "256 3"] | None = None,
) -> None:
    """Writes RGB, or indices of an RGB palette, as a PNG that names its origin: `is_own_picture`.

    The file appears atomically. NumPy and zlib do all the work, so that threads can write several
    at the same time.
    """
    # Each row begins with the number of its filter. "Up" stores the difference from the row above:
    # for pictures it is as small as the filter that libpng chooses for each row, in half the time.
    height, width = image.shape[:2]
    pixels = image.reshape(height, -1)
    rows = np.zeros((height, 1 + pixels.shape[1]), np.uint8)
    rows[:, 1:] = pixels
    if palette is None:
        np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
        rows[:, 0], color_type, strategy, table = 2, 2, zlib.Z_DEFAULT_STRATEGY, b""
    else:  # ids form runs
        color_type, strategy, table = 3, zlib.Z_RLE, _chunk(b"PLTE", palette.tobytes())
    deflate = zlib.compressobj(level=1, strategy=strategy)
    parts = (
        b"\x89PNG\r\n\x1a\n",
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)),
        _chunk(b"tEXt", _ORIGIN) + table,
        _chunk(b"IDAT", deflate.compress(rows.data) + deflate.flush()),
        _chunk(b"IEND", b""),
    )
    write_bytes(path, b"".join(parts))


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def is_own_picture(path: pathlib.Path) -> bool:
    """Whether this package wrote the picture, for example as the overlay of a prediction."""
    try:
        with path.open("rb") as file:
            return file.read(128)[41:].startswith(_ORIGIN)
    except OSError:
        return False


def require_writable(folder: pathlib.Path, option: str = "", *, create: bool = False) -> None:
    """Checks that files can be created in a folder, by creating and deleting one.

    Args:
      folder: to check.
      option: what gave the folder, for the error message.
      create: whether to create the folder and its parents if they do not exist.

    Raises:
      UserError: the folder does not exist or cannot be written to.
    """
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        subject = f"{option} {folder}".strip()
        raise UserError(f"{subject} cannot be written to: {error.strerror}") from None
