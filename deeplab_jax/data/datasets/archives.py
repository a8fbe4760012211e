"""Finds, downloads, verifies and unpacks the published archives of data sets."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import tarfile
import zlib
from collections.abc import Iterable, Sequence

import rich.progress
from rich.console import Console

from deeplab_jax.utils.download import download_file, file_digest
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import expand_home


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive."""

    file_name: str
    urls: tuple[str, ...]  # where it is published, the official place first
    folder: str  # the folder in the archive that holds all that is used
    marker: str = ""  # a path below `folder`, by which the unpacked archive is recognized
    md5: str = ""  # of the file, hexadecimal; empty for an archive that is not downloaded
    num_bytes: int = 0


def find_archive(archive: Archive, root: pathlib.Path) -> pathlib.Path | None:
    """Finds the folder of an unpacked archive below a root or, failing that, its file there."""
    if (root / archive.folder / archive.marker).exists():
        return root / archive.folder
    return root / archive.file_name if (root / archive.file_name).is_file() else None


def find_archives(archives: Iterable[Archive], root: str, hint: str) -> dict[Archive, pathlib.Path]:
    """Finds each archive in the folder `config.root`; see `find_archive`.

    Raises:
      UserError: archives are missing. The message lists them and ends with the hint.
    """
    folder = expand_home(root)
    found = {archive: find_archive(archive, folder) if root else None for archive in archives}
    missing = [archive for archive, path in found.items() if path is None]
    if missing:
        state = " is empty"
        if root:
            lacks = "does not hold what this split needs" if folder.exists() else "does not exist"
            state = f": {folder} {lacks}"
            if any(find_archive(archive, folder.parent) for archive in missing):
                hint += f" {folder.parent} looks like the root."
        needed = [
            f"- {pathlib.PurePosixPath(archive.folder, archive.marker)}, or {archive.file_name} "
            f"from {archive.urls[0]}"
            for archive in missing
        ]
        heading = f"config.data.root{state}. It must be a folder that holds"
        raise UserError("\n".join([heading, *needed, hint]))
    return {archive: path for archive, path in found.items() if path is not None}


def download(archive: Archive, folder: pathlib.Path) -> pathlib.Path:
    """Downloads an archive into `folder` and verifies it, unless its file exists.

    Not for two processes at once: the partial file of a killed process is deleted.

    Raises:
      UserError: no URL could be read, naming each URL and why.
    """
    target = folder / archive.file_name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f".{archive.file_name}.*.partial"):
            partial.unlink()
        advice = "Get it by other means and set config.data.root to the folder that holds it."
        download_file(archive.urls, target, algorithm="md5", digest=archive.md5, advice=advice)
    return target


def unpack(
    archive: Archive, path: pathlib.Path, folders: Sequence[str], target: pathlib.Path
) -> pathlib.Path:
    """Unpacks folders of a tar file below `target`, unless the archive is unpacked already.

    A file of the published size must have the published checksum. A file of another size is taken
    for one that the user packed; it only has to be complete.

    Args:
      archive: the archive.
      path: its file, or its unpacked folder.
      folders: folders in the archive's folder, "." for itself. Subfolders are not unpacked.
      target: an existing folder.

    Returns:
      The unpacked archive's folder.

    Raises:
      UserError: the tar file is damaged, or is not the archive.
    """
    if path.is_dir():
        return path
    if path.stat().st_size != archive.num_bytes:
        logging.warning("%s is not %s as published; using what it holds", path, archive.file_name)
    elif (md5 := file_digest(path, "md5")) != archive.md5:
        raise UserError(
            f"{path}: is damaged: its MD5 checksum is {md5}, {archive.md5} as published. "
            f"Delete it and download it again from {archive.urls[0]}"
        )
    wanted = {pathlib.PurePosixPath(archive.folder, folder) for folder in folders}
    title, console = f"Unpacking {path.name}", Console(stderr=True)
    try:
        with (
            rich.progress.open(path, "rb", description=title, console=console) as file,
            tarfile.open(fileobj=file, mode="r|*") as tar,
        ):
            for member in tar:
                name = pathlib.PurePosixPath(member.name)
                content = tar.extractfile(member) if member.isreg() else None
                if content is not None and name.parent in wanted and ".." not in name.parts:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    (target / name).write_bytes(content.read())
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: the archive is damaged or truncated ({error}); it has {path.stat().st_size} "
            f"bytes, {archive.num_bytes} as published. Download it again from {archive.urls[0]}"
        ) from None
    folder = target / archive.folder
    if not (folder / archive.marker).is_file():
        raise UserError(
            f"{path}: holds no {archive.folder}/{archive.marker}. Expected {archive.urls[0]}"
        )
    return folder
