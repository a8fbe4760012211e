"""Finds a model by its description: a config file, an architecture's name, or trained weights."""

from __future__ import annotations

import dataclasses
import os
import re

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config
from deeplab_jax.config import io as config_io
from deeplab_jax.config.rules import validate
from deeplab_jax.data import DATASETS, labels, stage
from deeplab_jax.models.architecture import ARCHITECTURES, Architecture, architecture
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.utils.paths import is_bucket
from deeplab_jax.weights import hub
from deeplab_jax.weights.convert import read_model
from deeplab_jax.weights.saved_model import SavedModel

PAPER_SIZE = (513, 513)  # arXiv 1706.05587, section 4.1: side of a crop, pixels
PAPER_CLASSES = 21  # of PASCAL VOC


@dataclasses.dataclass(frozen=True)
class Description:
    """A model and the image size it is for."""

    architecture: Architecture
    size: tuple[int, int]  # height and width of the images or crops it is trained on, pixels
    saved: SavedModel | None = None  # the trained model


def read(source: str, *, num_classes: int | None = None) -> Description:
    """Describes the model that a text names.

    The text is a name in `ARCHITECTURES`; a config as `config.io.from_python` takes it; or a
    trained model, see `weights.convert.read_model`. A path that exists is no name of a config.
    `num_classes` is for a config that takes it from its data, or for a name; None: the data's, or
    VOC's.

    Raises:
      UserError: the source is none of them or cannot be read, or the number of classes is unknown
        or invalid.
    """
    if num_classes is not None and not 1 <= num_classes <= labels.IGNORE:
        raise UserError(f"--num-classes must be 1 to {labels.IGNORE}, got {num_classes}")
    if source in ARCHITECTURES:
        return Description(
            architecture(source, num_classes=num_classes or PAPER_CLASSES), PAPER_SIZE
        )
    if config_io.is_config_file(source) or (
        config_io.is_config(source) and not os.path.exists(source)
    ):
        return of_config(config_io.from_python(source), source, num_classes)
    if not (os.path.exists(source) or is_bucket(source) or hub.is_name(source)):
        raise UserError(_unknown(source))
    if num_classes is not None:
        raise UserError(f"--num-classes: {source} is a trained model, which has its own")
    saved = read_model(source)
    _ = saved.variables  # which may raise
    height, width = saved.info["input_size"]
    return Description(saved.architecture, (height, width), saved)


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Parses "513" or "360x480" as height and width, pixels.

    Raises:
      UserError: the text has another form, or a side is below 1.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(sides) < 1:
        raise UserError(
            f"{option} must be a side such as 513, or height x width such as 360x480, of 1 pixel "
            f"or more; got {text!r}"
        )
    return sides


def of_config(config: Config, source: str, num_classes: int | None = None) -> Description:
    """Describes the model of a config, which errors call `source`, without reading its data.

    Without `num_classes`, a config that takes it from its data has the data set's, if it is known.

    Raises:
      UserError: the config is invalid, or the number of classes is not known.
    """
    validate(config)
    fields = dataclasses.asdict(config.model)
    name, classes = fields.pop("architecture"), fields.pop("num_classes")
    classes = num_classes or classes or _data_classes(config)
    if classes is None:
        raise UserError(
            f"{source} takes the number of classes from its data, which is not available: give "
            "--num-classes"
        )
    chosen = architecture(name, num_classes=classes, in_channels=len(config.data.mean), **fields)
    return Description(chosen, config_lib.crop_shape(config.data))


def _data_classes(config: Config) -> int | None:
    """The number of classes of a config's data, if it is known without reading the images."""
    if config.data.name != "folder":
        return DATASETS[config.data.name].num_classes
    from deeplab_jax.data.datasets.mask_format import class_file
    from deeplab_jax.data.io import classes

    def may_be(name: str) -> bool:
        return name.rpartition("/")[2].lower() in classes.FILE_NAMES

    path = class_file(stage(config.data, may_be))[0]
    return classes.read(path).labels.num_classes if path else None


def _unknown(source: str) -> str:
    published = [name for name in hub.FILES if name.startswith("deeplab") and "." not in name]
    hint = did_you_mean(source, [*ARCHITECTURES, *published])
    return (
        f"there is nothing at {source!r}, and it is not the name of a model{hint}.\n"
        "Expected a config file that ends in .py, the name of a config of this package, a workdir, "
        "a checkpoint, a weights file, or "
        f"one of {', '.join([*ARCHITECTURES, *published])}"
    )
