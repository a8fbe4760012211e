"""torchvision's published weights by name: from a cache on this machine, or downloaded into it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import pathlib
import urllib.request
import uuid
from collections.abc import Iterator

import rich.progress
from rich.console import Console

from deeplab_jax.utils.errors import UserError, did_you_mean

BASE_URL = "https://download.pytorch.org/models/"

# File by model and version, as in torchvision 0.28's enums of weights. What follows the last "-"
# is how the file's SHA-256 begins.
_PUBLISHED: dict[str, dict[str, str]] = {
    "deeplabv3_resnet50": {"COCO_WITH_VOC_LABELS_V1": "deeplabv3_resnet50_coco-cd0a2569.pth"},
    "deeplabv3_resnet101": {"COCO_WITH_VOC_LABELS_V1": "deeplabv3_resnet101_coco-586e9e4e.pth"},
    "deeplabv3_mobilenet_v3_large": {
        "COCO_WITH_VOC_LABELS_V1": "deeplabv3_mobilenet_v3_large-fc3c493d.pth"
    },
    "resnet18": {"IMAGENET1K_V1": "resnet18-f37072fd.pth"},
    "resnet34": {"IMAGENET1K_V1": "resnet34-b627a593.pth"},
    "resnet50": {
        "IMAGENET1K_V1": "resnet50-0676ba61.pth",
        "IMAGENET1K_V2": "resnet50-11ad3fa6.pth",
    },
    "resnet101": {
        "IMAGENET1K_V1": "resnet101-63fe2227.pth",
        "IMAGENET1K_V2": "resnet101-cd907fc2.pth",
    },
    "resnet152": {
        "IMAGENET1K_V1": "resnet152-394f9c45.pth",
        "IMAGENET1K_V2": "resnet152-f82ba261.pth",
    },
    "mobilenet_v3_large": {
        "IMAGENET1K_V1": "mobilenet_v3_large-8738ca79.pth",
        "IMAGENET1K_V2": "mobilenet_v3_large-5c1a4163.pth",
    },
}

# File by name: "resnet50.IMAGENET1K_V2", or "resnet50", which is the model's first version.
FILES: dict[str, str] = {
    name: file_name
    for model, versions in _PUBLISHED.items()
    for name, file_name in [
        (model, next(iter(versions.values()))),
        *((f"{model}.{version}", file_name) for version, file_name in versions.items()),
    ]
}

_TIMEOUT = 30.0  # seconds without an answer
_CHUNK = 1 << 20  # bytes


def is_name(text: str) -> bool:
    """Whether a text is the name of published weights, such as "deeplabv3_resnet50"."""
    return text in FILES


def fetch(name: str, *, base_url: str = BASE_URL) -> pathlib.Path:
    """The file of published weights, downloaded unless it is on this machine.

    Looked for in this package's cache, then in PyTorch's. A file counts only if its SHA-256 begins
    as published. A download becomes visible under its name once it is whole.

    Args:
      name: a key of `FILES`.
      base_url: what stands before the file's name, "/" included.

    Raises:
      UserError: an unknown name; or the file is not here and cannot be downloaded, or is not the
        published one: with the URL, and the place to put a file that was fetched by other means.
    """
    file_name = FILES.get(name)
    if file_name is None:
        hint = did_you_mean(name, FILES)
        raise UserError(f"unknown weights {name!r}{hint}. Known: {', '.join(sorted(FILES))}")
    target = cache_folder() / file_name
    for path in (target, torch_cache_folder() / file_name):
        if path.is_file() and _is_usable(path):
            return path
    _download(base_url + file_name, target)
    return target


def cache_folder() -> pathlib.Path:
    """Where downloads go: `$XDG_CACHE_HOME/deeplab_jax/weights`, by default below `~/.cache`."""
    return _user_cache() / "deeplab_jax" / "weights"


def torch_cache_folder() -> pathlib.Path:
    """Where `torch.hub` keeps its downloads: `$TORCH_HOME/hub/checkpoints`."""
    home = os.environ.get("TORCH_HOME")
    torch_home = pathlib.Path(home).expanduser() if home else _user_cache() / "torch"
    return torch_home / "hub" / "checkpoints"


def _user_cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _published_hash(file_name: str) -> str:
    return file_name.removesuffix(".pth").rpartition("-")[2]


def _is_usable(path: pathlib.Path) -> bool:
    """Whether a file can be read and is as published; if not, the log says why."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        logging.warning("%s cannot be read (%s), and is not used", path, error.strerror)
        return False
    if not digest.startswith(_published_hash(path.name)):
        logging.warning("%s is damaged (its SHA-256 is another), and is not used", path)
        return False
    return True


def _download(url: str, target: pathlib.Path) -> None:
    by_hand = f"Fetch {url} by other means and put it there as {target}"
    with _aside(target) as partial:
        try:
            digest = _stream(url, partial)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url} could not be downloaded: {error}. {by_hand}") from error
        expected = _published_hash(target.name)
        if not digest.startswith(expected):
            raise UserError(
                f"{url} gave another file than was published: its SHA-256 begins with "
                f"{digest[: len(expected)]}, expected {expected} (a proxy may have answered "
                f"instead). Nothing was kept. {by_hand}"
            )
        partial.replace(target)


@contextlib.contextmanager
def _aside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty file beside the target, which is gone afterwards unless it was moved."""
    # Not a fixed name: two processes may fetch the same weights at once.
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written ({error.strerror}), so {target.name} cannot be "
            "kept there: set XDG_CACHE_HOME to a folder that can"
        ) from error
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _stream(url: str, path: pathlib.Path) -> str:
    """Downloads into a file, and gives the SHA-256 of what came."""
    digest, received = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, path.open("wb") as file:
        expected = int(response.headers.get("Content-Length", 0))
        with rich.progress.wrap_file(
            response, expected, description=f"Downloading {url}", console=Console(stderr=True)
        ) as watched:
            while chunk := watched.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
    if received < expected:
        raise ConnectionError(f"the connection broke off after {received} of {expected} bytes")
    return digest.hexdigest()
