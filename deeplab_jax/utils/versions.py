"""The versions that decide the bytes of a run: of its batches and of its steps."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib
import platform

BATCHES, STEPS = "images or augmentation", "rounding of the steps"
# What another version can change. Distributions that are not installed are left out.
_PACKAGES = {
    "jax": STEPS,
    "jaxlib": STEPS,
    "jax-cuda12-plugin": STEPS,
    "jax-cuda13-plugin": STEPS,
    "nvidia-cudnn-cu12": STEPS,
    "nvidia-cudnn-cu13": STEPS,
    "libtpu": STEPS,
    "flax": STEPS,
    "optax": STEPS,
    "orbax-checkpoint": "how checkpoints are read",
    "numpy": BATCHES,
    "pillow": BATCHES,
    "grain": BATCHES,
    "deeplab_jax": "any of it",
}
EFFECTS = _PACKAGES | {
    "python": "any of it",
    "opencv": BATCHES,
    "deeplab_jax source": "any of it",
}
_OPENCV = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
)
_SOURCE = pathlib.Path(__file__).parents[1]


def byte_versions() -> dict[str, str]:
    """Returns the version of everything that decides a run's bytes; its names are in `EFFECTS`.

    OpenCV's is that of the library that is imported, with the distributions that hold it: several
    can be installed over each other.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        if found := _version(name):
            versions[name] = found
    return versions | {"opencv": _opencv(), "deeplab_jax source": source_digest()}


def source_digest() -> str:
    """Returns a digest of the names and contents of this package's source files."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.rglob("*.py")):
        digest.update(str(path.relative_to(_SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _opencv() -> str:
    import cv2  # takes 0.1 s, and most commands need no images

    file = pathlib.Path(cv2.__file__)
    holders = [
        f"{name} {_version(name)}"
        for name in _OPENCV
        if _version(name)
        and pathlib.Path(
            str(importlib.metadata.distribution(name).locate_file("cv2/__init__.py"))
        ).resolve()
        == file.resolve()
    ]
    return f"{cv2.__version__} ({', '.join(holders) or 'no wheel'})"
