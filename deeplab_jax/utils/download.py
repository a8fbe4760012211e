"""Downloads of published files, with a progress bar and a checksum."""

from __future__ import annotations

import hashlib
import http.client
import pathlib
import shutil
import urllib.request
from collections.abc import Sequence

import rich.progress
from rich.console import Console

from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import atomic_path

_TIMEOUT = 30.0  # seconds without an answer
_CHUNK = 1 << 20  # bytes


def download_file(
    urls: Sequence[str], path: pathlib.Path, *, algorithm: str, digest: str, advice: str
) -> None:
    """Downloads a file from the first URL that provides it.

    The file appears under its name only when it is complete and its checksum is right.

    Args:
      urls: where the file is published, in the order in which they are tried.
      path: where to save the file, in an existing folder.
      algorithm: hash function of the checksum, a name in `hashlib`.
      digest: the published checksum or its first digits, hexadecimal.
      advice: the end of the error message.

    Raises:
      UserError: no URL provided the file. The message lists each URL with the reason.
    """
    failures = []
    for url in urls:
        try:
            with atomic_path(path) as partial:
                _fetch(url, partial)
                found = file_digest(partial, algorithm)[: len(digest)]
                if found != digest:
                    raise UserError(
                        f"the downloaded file is not the published one: its {algorithm.upper()} "
                        f"checksum begins with {found}, expected {digest} (a proxy may have "
                        "answered instead)"
                    )
            return
        except (OSError, http.client.HTTPException, UserError) as error:
            failures.append(f"- {url}: {error}")
    raise UserError("\n".join([f"{path.name} could not be downloaded:", *failures, advice]))


def file_digest(path: pathlib.Path, algorithm: str) -> str:
    """Returns the hexadecimal checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()


def _fetch(url: str, path: pathlib.Path) -> None:
    with path.open("wb") as file, urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
        expected = int(response.headers.get("Content-Length", 0))
        with rich.progress.wrap_file(
            response, expected, description=f"Downloading {url}", console=Console(stderr=True)
        ) as watched:
            shutil.copyfileobj(watched, file, _CHUNK)
        received = file.tell()
    if received < expected:
        raise ConnectionError(f"the connection broke off after {received} of {expected} bytes")
