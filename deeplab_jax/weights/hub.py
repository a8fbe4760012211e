"""Published weights by name and on Hugging Face's hub, cached on this machine."""

from __future__ import annotations

import logging
import os
import pathlib
import re

from deeplab_jax.utils.download import download_file, file_digest
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.files import require_writable
from deeplab_jax.utils.paths import expand_home, is_bucket, required_path, user_cache
from deeplab_jax.weights import hub_folder, hugging_face, saved_model

_TORCHVISION_URL = "https://download.pytorch.org/models/"
# Model, version and file without ".pth", as in torchvision 0.28's enums of weights. The part after
# the last "-" is the beginning of the file's SHA-256 checksum, here and in mmsegmentation's names.
_TORCHVISION = """
deeplabv3_resnet50 COCO_WITH_VOC_LABELS_V1 deeplabv3_resnet50_coco-cd0a2569
deeplabv3_resnet101 COCO_WITH_VOC_LABELS_V1 deeplabv3_resnet101_coco-586e9e4e
deeplabv3_mobilenet_v3_large COCO_WITH_VOC_LABELS_V1 deeplabv3_mobilenet_v3_large-fc3c493d
resnet18 IMAGENET1K_V1 resnet18-f37072fd
resnet34 IMAGENET1K_V1 resnet34-b627a593
resnet50 IMAGENET1K_V1 resnet50-0676ba61
resnet50 IMAGENET1K_V2 resnet50-11ad3fa6
resnet101 IMAGENET1K_V1 resnet101-63fe2227
resnet101 IMAGENET1K_V2 resnet101-cd907fc2
resnet152 IMAGENET1K_V1 resnet152-394f9c45
resnet152 IMAGENET1K_V2 resnet152-f82ba261
mobilenet_v2 IMAGENET1K_V1 mobilenet_v2-b0353104
mobilenet_v2 IMAGENET1K_V2 mobilenet_v2-7ebf99e0
mobilenet_v3_large IMAGENET1K_V1 mobilenet_v3_large-8738ca79
mobilenet_v3_large IMAGENET1K_V2 mobilenet_v3_large-5c1a4163
"""

# mmsegmentation's DeepLabv3 files, "deeplabv3_....pth", with the most steps of each model; see its
# configs/deeplabv3/metafile.yaml. The second server is that of its fork onedl-mmsegmentation.
_MMSEG_URLS = (
    "https://download.openmmlab.com/mmsegmentation/v0.5/deeplabv3/",
    "https://mmassets.onedl.ai/mmsegmentation/v0.5/deeplabv3/",
)
_MMSEG = """
r50-d8_512x512_40k_voc12aug_20200613_161546-2ae96e7e
r101-d8_512x512_40k_voc12aug_20200613_161432-0017d784
r50-d8_512x512_160k_ade20k_20200615_123227-5d0ee427
r101-d8_512x512_160k_ade20k_20200615_105816-b1f72b3b
r18-d8_512x1024_80k_cityscapes_20201225_021506-23dffbe2
r50-d8_512x1024_80k_cityscapes_20200606_113404-b92cfdd4
r101-d8_512x1024_80k_cityscapes_20200606_113503-9e428899
r101-d16-mg124_512x1024_80k_cityscapes_20200908_005644-57bb8425
r18b-d8_512x1024_80k_cityscapes_20201225_094144-46040cef
r50b-d8_512x1024_80k_cityscapes_20201225_155148-ec368954
r101b-d8_512x1024_80k_cityscapes_20201226_171821-8fd49503
"""

# Repositories of Hugging Face's hub that can be named without "hf://".
REPOSITORIES = (
    "google/deeplabv3_mobilenet_v2_1.0_513",
    "timm/resnet50.a1_in1k",
    "timm/resnet50d.ra4_e3600_r224_in1k",
    "timm/resnet101.a1h_in1k",
    "timm/resnet101d.ra2_in1k",
)


def _urls() -> dict[str, tuple[str, ...]]:
    urls: dict[str, tuple[str, ...]] = {}
    for row in _TORCHVISION.strip().splitlines():
        model, version, file = row.split()
        urls[f"{model}.{version}"] = (f"{_TORCHVISION_URL}{file}.pth",)
        urls.setdefault(model, urls[f"{model}.{version}"])
    for row in _MMSEG.split():
        folder = "deeplabv3_" + row.rsplit("_", 2)[0]
        name = "mmseg/" + re.sub(r"_\d+x\d+_\d+k", "", folder)
        urls[name] = tuple(f"{server}{folder}/deeplabv3_{row}.pth" for server in _MMSEG_URLS)
    return urls


# URLs of a file by its name: "resnet50.IMAGENET1K_V2", "resnet50" for the model's first version, or
# "mmseg/deeplabv3_r50-d8_voc12aug".
FILES = _urls()


def find_weights(source: str | os.PathLike[str], field: str = "") -> pathlib.Path:
    """Returns the folder or file that `source` names, after downloading published weights.

    Args:
      source: A folder or file, also in a bucket (`gs://bucket/run`), a key of `FILES`, one of
        `REPOSITORIES`, or `hf://org/name`, with a revision and a path as in
        `hf://org/name@v1.0/folder/model.safetensors`.
      field: The config field that gave the source, for the error message.

    Raises:
      UserError: There is no such folder, file or name; or as `fetch` and `hugging_face.download`.
    """
    path = required_path(source, field or "the path of the weights")
    name = os.fspath(source)
    if path.is_dir():
        return path
    try:
        if is_bucket(name):
            return _from_bucket(name)
        if name in FILES:
            return fetch(name)
        if is_name(name):
            return hugging_face.download(name)
    except UserError as error:
        raise UserError(f"{field} = {name!r}: {error}" if field else str(error)) from None
    if not path.is_file():
        subject = f"{field} = {str(source)!r}" if field else f"{source}"
        names = [*(name for name in FILES if "." not in name), *REPOSITORIES]
        raise UserError(
            f"{subject} is neither a weights file, nor a folder with a checkpoint or weights, nor "
            f"hf://org/name, nor a name of published weights"
            f"{did_you_mean(name, [*FILES, *REPOSITORIES])}: {', '.join(names)}"
        )
    return path


def _from_bucket(url: str) -> pathlib.Path:
    """Copies the model at an address, of a run the best checkpoint; returns its local path."""
    from deeplab_jax.buckets import staging

    path = staging.stage_model(url)
    if not hub_folder.is_checkpoint(path) or (path / "model").is_dir():
        return path
    best = saved_model.find_checkpoint(path)  # whose arrays are not here yet
    run = url.rstrip("/").removesuffix("/checkpoints")
    return staging.stage_model(f"{run}/checkpoints/{best.name}")


def is_name(text: str) -> bool:
    """Whether a text names published weights: "deeplabv3_resnet50", "hf://org/name"."""
    return text in FILES or text in REPOSITORIES or hugging_face.is_remote(text)


def fetch(name: str) -> pathlib.Path:
    """Returns the file of a key of `FILES`, downloaded unless it is in our cache or PyTorch's.

    Raises:
      UserError: The cache cannot be written to; or the file cannot be downloaded, with the URL and
        where to put the file if it is fetched by other means.
    """
    urls = FILES[name]
    file_name = urls[0].rpartition("/")[2]
    digest = file_name.removesuffix(".pth").rpartition("-")[2]
    path = cache_folder() / file_name
    for cached in (path, torch_cache_folder() / file_name):
        if cached.is_file() and _is_intact(cached, digest):
            return cached
    try:
        require_writable(cache_folder(), create=True)
    except UserError as error:
        raise UserError(f"{error}. Set XDG_CACHE_HOME to a folder that can be written to") from None
    advice = f"Fetch {urls[0]} by other means and put it there as {path}"
    download_file(urls, path, algorithm="sha256", digest=digest, advice=advice)
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
    problem = "is damaged (its SHA-256 checksum is wrong)"
    try:
        if file_digest(path, "sha256").startswith(digest):
            return True
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    logging.warning("%s %s, and is not used", path, problem)
    return False
