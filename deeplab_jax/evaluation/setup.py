"""What the command line's words mean: which data, and whether the model fits them."""

from __future__ import annotations

import dataclasses
import re

from deeplab_jax import config_files, config_rules
from deeplab_jax import data as data_lib
from deeplab_jax.config import Config, DataConfig
from deeplab_jax.data.dataset import Dataset, Example, Source
from deeplab_jax.errors import UserError
from deeplab_jax.labels import LabelSet


def base_config(data: str, checkpoint: str) -> Config:
    """The config whose data section and `eval.size` an evaluation takes.

    Args:
      data: name of a data set, a config file that ends in `.py`, or empty for what the checkpoint
        was trained on.
      checkpoint: a workdir, or a path in it; it may also be no part of a run.

    Raises:
      UserError: nothing says which data are meant.
    """
    if data.endswith(".py"):
        return config_files.from_python(data)
    run = config_files.of_run(checkpoint)
    # A run's own settings, such as its root and its size, hold for its data set.
    if run is not None and data in ("", run.data.name):
        return run
    if not data:
        raise UserError(
            f"{checkpoint} is no run of train.py, whose config.json would say which data it is "
            "for: give --data, a data set's name or a config file"
        )
    return Config(data=DataConfig(name=data))


def validate(config: Config) -> None:
    """As `config.validate`, in the words of the command's options.

    Raises:
      UserError: naming each option that is wrong and what it must be.
    """
    try:
        config_rules.validate(config)
    except UserError as error:
        raise UserError(
            re.sub(r"(?:config\.)?eval\.(\w+)", lambda m: "--" + m[1].replace("_", "-"), str(error))
        ) from None


def load_dataset(config: DataConfig, limit: int) -> Dataset:
    """A data set's `eval_split`, or its first images.

    Args:
      config: of the data.
      limit: how many images at most; 0: all.

    Raises:
      UserError: as `data.load`.
    """
    dataset = data_lib.load(config, config.eval_split)
    if limit and limit < len(dataset.source):
        return dataclasses.replace(dataset, source=_First(dataset.source, limit))
    return dataset


@dataclasses.dataclass(frozen=True)
class _First:
    """The first examples of a source."""

    source: Source
    limit: int

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, index: int) -> Example:
        return self.source[index]


def check_fit(model: LabelSet, num_channels: int, dataset: Dataset) -> list[str]:
    """Sees that a model's classes and channels are those of a data set.

    Args:
      model: classes of the model.
      num_channels: of the images that the model takes.
      dataset: to be evaluated on.

    Returns:
      Warnings: classes of the same id with other names, where that may be a matter of spelling.

    Raises:
      UserError: another number of classes, the same names in another order, or other channels.
    """
    ours, theirs = model.names, dataset.labels.names
    if num_channels != dataset.num_channels:
        raise UserError(
            f"the checkpoint takes images of {num_channels} channels, those of the data set have "
            f"{dataset.num_channels}"
        )
    reordered = ours != theirs and sorted(ours) == sorted(theirs)
    if len(ours) != len(theirs) or reordered:
        raise UserError(
            "the classes of the checkpoint are not those of the data set"
            f"{' (the same names in another order)' if reordered else ''}:\n"
            f"  checkpoint, {len(ours)}: {', '.join(ours)}\n"
            f"  data set, {len(theirs)}: {', '.join(theirs)}\n"
            "Choose --data with the classes that the model was trained on."
        )
    if all(name == f"class {index}" for index, name in enumerate(ours)):
        return []  # weights from elsewhere, which name no classes
    differing = [
        f"{index} is {one} in the checkpoint, {other} in the data"
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True))
        if one != other
    ]
    return [f"classes named otherwise: {'; '.join(differing)}"] if differing else []
