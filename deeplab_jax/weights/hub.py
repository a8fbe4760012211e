"""torchvision's published weights by name, cached on this machine."""

from __future__ import annotations

import logging
import os
import pathlib

from deeplab_jax.utils.download import download_file, file_digest
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.files import require_writable
from deeplab_jax.utils.paths import expand_home, required_path, user_cache

BASE_URL = "https://download.pytorch.org/models/"

# File by model and version, as in torchvision 0.28's enums of weights. The part after the last "-"
# is the beginning of the file's SHA-256 checksum.
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

# File by name: "resnet50.IMAGENET1K_V2", or "resnet50" for the model's first version.
FILES: dict[str, str] = {
    name: file_name
    for model, versions in _PUBLISHED.items()
    for name, file_name in [
        (model, next(iter(versions.values()))),
        *((f"{model}.{version}", file_name) for version, file_name in versions.items()),
    ]
}


def find_weights(source: str | os.PathLike[str], field: str = "") -> pathlib.Path:
    """Returns the folder or file that `source` names, after downloading published weights.

    Args:
      source: A folder, a file, or a key of `FILES`.
      field: The config field that gave the source, for the error message.

    Raises:
      UserError: There is no such folder, file or name; or as `fetch`.
    """
    path = required_path(source, field or "the path of the weights")
    if path.is_dir():
        return path
    if is_name(str(source)):
        return fetch(str(source))
    if not path.is_file():
        subject = f"{field} = {str(source)!r}" if field else f"{source}"
        names = [name for name in FILES if "." not in name]
        raise UserError(
            f"{subject} is neither a weights file, nor a folder with a checkpoint, nor a name "
            f"of torchvision's weights{did_you_mean(str(source), names)}: {', '.join(names)}"
        )
    return path


def is_name(text: str) -> bool:
    """Whether a text is the name of published weights, such as "deeplabv3_resnet50"."""
    return text in FILES


def fetch(name: str, *, base_url: str = BASE_URL) -> pathlib.Path:
    """Returns the file of published weights, downloaded unless it is on this machine.

    The file is looked up in this package's cache, then in PyTorch's. A file whose SHA-256 checksum
    is wrong is not used.

    Args:
      name: A key of `FILES`.
      base_url: The URL before the file's name, with the last "/".

    Raises:
      UserError: The name is unknown; the cache cannot be written to; or the file cannot be
        downloaded, with the URL and where to put the file if it is fetched by other means.
    """
    file_name = FILES.get(name)
    if file_name is None:
        hint = did_you_mean(name, FILES)
        raise UserError(f"unknown weights {name!r}{hint}. Known: {', '.join(sorted(FILES))}")
    digest = file_name.removesuffix(".pth").rpartition("-")[2]
    path = cache_folder() / file_name
    for cached in (path, torch_cache_folder() / file_name):
        if cached.is_file() and _is_intact(cached, digest):
            return cached
    try:
        require_writable(cache_folder(), create=True)
    except UserError as error:
        raise UserError(f"{error}. Set XDG_CACHE_HOME to a folder that can be written to") from None
    url = base_url + file_name
    advice = f"Fetch {url} by other means and put it there as {path}"
    download_file([url], path, algorithm="sha256", digest=digest, advice=advice)
    return path


def cache_folder() -> pathlib.Path:
    """Returns the folder for downloads: `$XDG_CACHE_HOME/deeplab_jax/weights`."""
    return user_cache() / "deeplab_jax" / "weights"


def torch_cache_folder() -> pathlib.Path:
    """Returns the folder of `torch.hub`'s downloads: `$TORCH_HOME/hub/checkpoints`."""
    home = os.environ.get("TORCH_HOME")
    torch_home = expand_home(home) if home else user_cache() / "torch"
    return torch_home / "hub" / "checkpoints"


def _is_intact(path: pathlib.Path, digest: str) -> bool:
    """Whether a file can be read and has the published checksum; if not, logs why."""
    try:
        intact = file_digest(path, "sha256").startswith(digest)
    except OSError as error:
        logging.warning("%s cannot be read (%s), and is not used", path, error.strerror)
        return False
    if not intact:
        logging.warning("%s is damaged (its SHA-256 checksum is wrong), and is not used", path)
    return intact
