"""What decides the bytes of a run besides its config: versions, and images as they are decoded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2

from deeplab_jax.config import Config
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset, read_example
from deeplab_jax.utils.errors import UserError, print_warning

MADE_WITH = "made_with"  # key in the `info` of a checkpoint
BATCHES, STEPS, ALL = "images or augmentation", "rounding of the steps", "any of it"
# What another version can change. Distributions that are not installed are left out.
EFFECTS = {
    "python": ALL,
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
    "deeplab_jax": ALL,
    "opencv": BATCHES,
    "deeplab_jax source": ALL,
}
_OPENCV = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
)
_SOURCE = pathlib.Path(__file__).parents[1]


class Provenance(NamedTuple):
    """What decides the bytes of a run besides its config.

    Attributes:
      versions: see `byte_versions`.
      crop: digest of the first training crop, as training makes it. Versions do not tell all: the
        same OpenCV can be built in several ways.
      image: name of the crop's image.
    """

    versions: dict[str, str]
    crop: str
    image: str

    @property
    def info(self) -> dict[str, Any]:
        """The part that a checkpoint holds, without names of the user's data."""
        return {"versions": self.versions, "first crop": self.crop}

    @property
    def facts(self) -> dict[str, Any]:
        """What processes compare."""
        versions = {f"version of {name}": version for name, version in self.versions.items()}
        return versions | {f"first training crop, of image {self.image}": self.crop}


def provenance(config: Config, dataset: Dataset) -> Provenance:
    """Returns the provenance of what this process computes.

    Raises:
      UserError: the first image of the data set, with oversampling applied, cannot be read.
    """
    batch = pipeline.train_batch(
        *(dataset, config.data),
        batch_size=config.train.batch_size,
        seed=config.seed,
        step=0,
        rows=(0,),
    )
    digest = hashlib.sha256(batch["image"].tobytes() + batch["label"].tobytes())
    index = pipeline.train_index(len(dataset.source), config.seed, 0)
    image = read_example(dataset, index)["name"]
    return Provenance(byte_versions(), digest.hexdigest()[:16], image)


def check_resume(now: Provenance, info: Mapping[str, Any], step: int, *, strict: bool) -> None:
    """Warns if a run goes on otherwise than the `info` of its checkpoint of this step says.

    A checkpoint of an early version of this package says nothing.

    Raises:
      UserError: something differs, or the checkpoint says nothing, and `strict` is set.
    """
    then = info.get(MADE_WITH)
    if then == now.info or (then is None and not strict):
        return
    if then is None:
        raise UserError(
            f"checkpoint {step} does not say with which versions it was made, so that "
            "config.train.strict_resume cannot compare them: leave it out to resume"
        )
    old, new = then["versions"], now.versions
    changes = [
        f"  {name}: {old.get(name, 'none')} -> {new.get(name, 'none')}, which can change "
        f"{EFFECTS.get(name, ALL)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    crop = "the same bytes" if then["first crop"] == now.crop else "OTHER BYTES than then"
    lines = [
        f"the run resumes with other versions or images than those of checkpoint {step}:",
        *changes,
        f"  the first training crop, of image {now.image}, has {crop}",
        "It may not end with the bits of a run that was never interrupted. To be sure that it "
        "does, install the versions on the left and restore the images.",
    ]
    message = "\n".join(lines)
    if strict:
        raise UserError(f"{message} To go on as it is, leave out config.train.strict_resume.")
    print_warning(f"{message} With --config.train.strict_resume=true this is an error.")


def byte_versions() -> dict[str, str]:
    """Returns the version of everything that decides a run's bytes; its names are in `EFFECTS`."""
    file = pathlib.Path(cv2.__file__).resolve()
    distributions = [
        f"{name} {_version(name)}"
        for name in _OPENCV
        if _version(name) and _locate(name, "cv2/__init__.py") == file
    ]
    special = {
        "python": platform.python_version(),
        # Of the library that is imported: several distributions may be installed over each other.
        "opencv": f"{cv2.__version__} ({', '.join(distributions) or 'no wheel'})",
        "deeplab_jax source": source_digest(),
    }
    versions = {name: special.get(name) or _version(name) for name in EFFECTS}
    return {name: version for name, version in versions.items() if version}


def source_digest() -> str:
    """Returns a digest of the names and contents of this package's source files."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.rglob("*.py")):
        digest.update(str(path.relative_to(_SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _locate(distribution: str, file: str) -> pathlib.Path:
    return pathlib.Path(
        str(importlib.metadata.distribution(distribution).locate_file(file))
    ).resolve()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
