"""Published archives of data sets: finding, downloading, verifying and unpacking them."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import logging
import pathlib
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

import rich.progress
from rich.console import Console

from deeplab_jax.utils.errors import UserError

_TIMEOUT = 30.0  # seconds without an answer, before the next mirror is tried


@dataclasses.dataclass(frozen=True)
class Archive:
    """A tar file on the web.

    Attributes:
      file_name: as published.
      urls: where it is, the official place first.
      md5: of the file, hexadecimal.
      num_bytes: of the file.
      folder: path inside it, below which everything of interest lies.
      marker: a file below `folder` by which an unpacked archive is known.
    """

    file_name: str
    urls: tuple[str, ...]
    md5: str
    num_bytes: int
    folder: str
    marker: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an archive's content is on this machine: in a tar file, or unpacked."""

    archive: Archive
    path: pathlib.Path

    @property
    def unpacked(self) -> bool:
        return self.path.is_dir()


def find(archive: Archive, root: pathlib.Path) -> Place | None:
    """The unpacked archive below a root or, failing that, the tar file in it."""
    if (root / archive.folder / archive.marker).is_file():
        return Place(archive, root / archive.folder)
    if (root / archive.file_name).is_file():
        return Place(archive, root / archive.file_name)
    return None


def download(archive: Archive, folder: pathlib.Path) -> Place:
    """The archive as a tar file in `folder`, downloaded if it is not there; verified at download.

    Not for two processes at once: what one that was killed has left is overwritten.

    Raises:
      UserError: no URL could be read, naming each URL and why.
    """
    target = folder / archive.file_name
    if target.is_file():
        return Place(archive, target)
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"incomplete.{target.name}")
    failures = []
    for url in archive.urls:
        try:
            _stream(url, partial)
            _require_md5(archive, partial)
            partial.replace(target)
            return Place(archive, target)
        except (OSError, http.client.HTTPException, UserError) as error:
            failures.append(f"- {url}: {error}")
        finally:
            partial.unlink(missing_ok=True)
    raise UserError(
        "\n".join([f"{archive.file_name} could not be downloaded:", *failures])
        + "\nGet it by other means, lay it in a folder, and set config.data.root to that folder."
    )


def _stream(url: str, path: pathlib.Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, path.open("wb") as file:
        expected = int(response.headers.get("Content-Length", 0))
        with rich.progress.wrap_file(
            response, expected, description=f"Downloading {url}", console=Console(stderr=True)
        ) as watched:
            shutil.copyfileobj(watched, file, 1 << 20)
    if expected and path.stat().st_size != expected:
        raise ConnectionError(f"the connection broke off after {path.stat().st_size} bytes")


def unpack(place: Place, folders: Sequence[str], into: pathlib.Path) -> pathlib.Path:
    """The archive's folder, unpacked below `into` unless it is unpacked already.

    A file of the published size must have the published checksum. Another size is taken for an
    archive that the user packed anew, and need only be whole.

    Args:
      place: an archive on this machine.
      folders: those in the archive's folder whose files are wanted; "." is itself.
      into: an existing folder, for this alone.

    Raises:
      UserError: the tar file is damaged, or holds nothing of what is wanted.
    """
    archive, path = place.archive, place.path
    if place.unpacked:
        return path
    if path.stat().st_size == archive.num_bytes:
        _require_md5(archive, path)
    else:
        logging.warning("%s is not %s as published; using what it holds", path, archive.file_name)
    target = into / archive.folder
    try:
        for member, content in _members(path):
            relative = _below(archive.folder, member)
            if relative is not None and relative.parent.as_posix() in folders:
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                (target / relative).write_bytes(content.read())
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: the archive is damaged or truncated ({error}); it has {path.stat().st_size} "
            f"bytes, {archive.num_bytes} as published. Download it again from {archive.urls[0]}"
        ) from None
    if not (target / archive.marker).is_file():
        raise UserError(
            f"{path}: holds no {archive.folder}/{archive.marker}. Expected {archive.urls[0]}"
        )
    return target


def _below(folder: str, member: str) -> pathlib.PurePosixPath | None:
    """Path of a tar member within a folder; None for one outside, or that would lead outside."""
    path = pathlib.PurePosixPath(member)
    if ".." in path.parts or not path.is_relative_to(folder):
        return None
    return path.relative_to(folder)


def _members(path: pathlib.Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of the files in a tar file, in one pass: read each before the next."""
    with (
        rich.progress.open(
            path, "rb", description=f"Unpacking {path.name}", console=Console(stderr=True)
        ) as file,
        tarfile.open(fileobj=file, mode="r|*") as tar,
    ):
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                yield member.name, content


def _require_md5(archive: Archive, path: pathlib.Path) -> None:
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 != archive.md5:
        raise UserError(
            f"{path}: is damaged: its MD5 checksum is {md5}, {archive.md5} as published. "
            f"Delete it and download it again from {archive.urls[0]}"
        )
