"""A model by whatever describes it: a config file, an architecture's name, or trained weights."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config
from deeplab_jax.config import io as config_files
from deeplab_jax.config import rules as config_rules
from deeplab_jax.data import DATASETS, labels
from deeplab_jax.models.architecture import ARCHITECTURES, Architecture, architecture
from deeplab_jax.utils.errors import UserError, did_you_mean
from deeplab_jax.weights import convert as conversion
from deeplab_jax.weights import hub
from deeplab_jax.weights.saved_model import SavedModel

PAPER_SIZE = (513, 513)  # arXiv 1706.05587, section 4.1: side of a crop, pixels
PAPER_CLASSES = 21  # of PASCAL VOC


@dataclasses.dataclass(frozen=True)
class Description:
    """A model and what it is for.

    Attributes:
      architecture: of the model.
      size: height and width of the images or crops it is trained on, pixels.
      saved: its weights, where there are some.
    """

    architecture: Architecture
    size: tuple[int, int]
    saved: SavedModel | None = None


def read(source: str, *, num_classes: int | None = None) -> Description:
    """What a text names.

    Args:
      source: a config file, `x.py` or `x.py:row`; a name in `ARCHITECTURES`; or what
        `weights.convert.read_model` takes: a workdir, a checkpoint, a file of weights, or a name
        under which torchvision publishes one.
      num_classes: for a config that leaves it to its data, or a name; None: the data's, or VOC's.

    Raises:
      UserError: it is none of them, is damaged, or the number of classes is not known or cannot be.
    """
    if num_classes is not None and not 1 <= num_classes <= labels.IGNORE:
        raise UserError(f"--num-classes must be 1 to {labels.IGNORE}, got {num_classes}")
    if source in ARCHITECTURES:
        return Description(
            architecture(source, num_classes=num_classes or PAPER_CLASSES), PAPER_SIZE
        )
    if config_files.is_config(source):
        return of_config(config_files.from_python(source), source, num_classes)
    if not os.path.exists(source) and not hub.is_name(source):
        raise UserError(_unknown(source))
    if num_classes is not None:
        raise UserError(f"--num-classes: {source} is a trained model, which has its own")
    saved = conversion.read_model(source)
    height, width = saved.info["input_size"]
    return Description(saved.architecture, (height, width), saved)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of "513" or "360x480".

    Raises:
      UserError: it is no such text, or a side is below 1.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(sides) < 1:
        raise UserError(
            "--size must be a side such as 513, or height x width such as 360x480, of 1 pixel or "
            f"more; got {text!r}"
        )
    return sides


def of_config(config: Config, source: str, num_classes: int | None = None) -> Description:
    """The model that a config describes, without its data.

    Args:
      config: of a run.
      source: what to call it in an error.
      num_classes: where the config leaves it to its data; None: the data's, if that can be told.

    Raises:
      UserError: the config is wrong, or the number of classes is not known.
    """
    config_rules.validate(config)
    fields = dataclasses.asdict(config.model)
    name, classes = fields.pop("architecture"), fields.pop("num_classes")
    classes = num_classes or classes or _data_classes(config)
    if classes is None:
        raise UserError(
            f"{source} leaves the number of classes to its data, which are not at hand: give "
            "--num-classes"
        )
    chosen = architecture(name, num_classes=classes, in_channels=len(config.data.mean), **fields)
    return Description(chosen, config_lib.crop_shape(config.data))


def _data_classes(config: Config) -> int | None:
    """How many classes a config's data have, if that can be told without reading their images."""
    if config.data.name != "folder":
        return DATASETS[config.data.name].num_classes
    from deeplab_jax.data.io import classes

    path = pathlib.Path(config.data.folder.classes or f"{config.data.root}/classes.txt")
    return classes.read(path).num_classes if path.is_file() else None


def _unknown(source: str) -> str:
    published = [name for name in hub.FILES if name.startswith("deeplab") and "." not in name]
    hint = did_you_mean(source, [*ARCHITECTURES, *published])
    return (
        f"there is nothing at {source!r}, and it is no name of a model{hint}.\n"
        "Expected a config file that ends in .py, a workdir, a checkpoint, a file of weights, or "
        f"one of {', '.join([*ARCHITECTURES, *published])}"
    )
