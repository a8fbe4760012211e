"""Notices that a run resumes with other versions or other images than its checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from deeplab_jax.config import Config
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset, read_example
from deeplab_jax.utils.errors import UserError, print_warning
from deeplab_jax.utils.versions import EFFECTS, byte_versions

MADE_WITH = "made_with"  # key in the `info` of a checkpoint


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What decides the bytes of a run beside its config.

    Attributes:
      versions: see `byte_versions`.
      crop: digest of the first training crop, as training makes it. Versions do not tell all: the
        same OpenCV can be built in several ways.
      image: name of the crop's image.
    """

    versions: Mapping[str, str]
    crop: str
    image: str

    @property
    def info(self) -> dict[str, Any]:
        """The part that a checkpoint holds, without names of the user's data."""
        return {"versions": dict(self.versions), "first crop": self.crop}

    @property
    def facts(self) -> dict[str, Any]:
        """The part that processes compare beside the versions."""
        return {f"first training crop, of image {self.image}": self.crop}

    def check_resume(self, info: Mapping[str, Any], step: int, *, strict: bool) -> None:
        """Warns if a run that goes on from a checkpoint differs from what the checkpoint says.

        Args:
          info: of the checkpoint. One of an earlier version of this package says nothing.
          step: of the checkpoint.
          strict: whether to raise an error instead.

        Raises:
          UserError: something differs, or the checkpoint says nothing, and `strict` is set.
        """
        then = info.get(MADE_WITH)
        if then is None:
            if strict:
                raise UserError(
                    f"checkpoint {step} does not say with which versions it was made, so that "
                    "config.train.strict_resume cannot compare them: leave it out to resume"
                )
            return
        old, new = then["versions"], self.versions
        changes = [
            f"  {name}: {old.get(name, 'none')} -> {new.get(name, 'none')}, which can change "
            f"{EFFECTS.get(name, 'any of it')}"
            for name in dict.fromkeys([*old, *new])
            if old.get(name) != new.get(name)
        ]
        is_same = then["first crop"] == self.crop
        if is_same and not changes:
            return
        crop = "has the same bytes" if is_same else "has OTHER BYTES than then"
        lines = [
            f"the run resumes with other versions or images than those of checkpoint {step}:",
            *changes,
            f"  the first training crop, of image {self.image}, {crop}",
            "It may not end with the bits of a run that was never interrupted. To be sure that it "
            "does, install the versions on the left and restore the images.",
        ]
        message = "\n".join(lines)
        if strict:
            raise UserError(f"{message} To go on as it is, leave out config.train.strict_resume.")
        print_warning(f"{message} With --config.train.strict_resume=true this is an error.")


def provenance(config: Config, dataset: Dataset) -> Provenance:
    """Returns the provenance of what this process computes.

    Args:
      config: of the run.
      dataset: the training split, with oversampling applied.

    Raises:
      UserError: the first image cannot be read.
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
