"""What the command line's words mean: which model, which data, and whether they fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from deeplab_jax import data as data_lib
from deeplab_jax.config import Config, DataConfig, EvalConfig
from deeplab_jax.config import io as config_files
from deeplab_jax.config import rules as config_rules
from deeplab_jax.data.dataset import Dataset, Example, Source
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.distributed.mesh import make_mesh
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.inference import segmenter
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setup:
    """An evaluation that is ready to run.

    Attributes:
      config: its `data` and `eval` hold.
      loaded: the model.
      dataset: the split.
      evaluator: of the model on the split.
      warnings: of `check_fit`.
    """

    config: Config
    loaded: Segmenter
    dataset: Dataset
    evaluator: Evaluator
    warnings: list[str]


def prepare(
    checkpoint: str,
    data: str,
    settings: EvalConfig,
    *,
    root: str = "",
    split: str = "",
    size: int | None = None,
    limit: int = 0,
    load: Callable[[DataConfig, str], Dataset] = data_lib.load,
) -> Setup:
    """What a command evaluates: a model on a split, as its options say.

    Args:
      checkpoint, data: see `base_config`.
      settings: all of them but `size`.
      root, split, size: empty or None: those of `base_config`.
      limit: how many images at most; 0: all.
      load: gives the split.

    Raises:
      UserError: an option, the model or the data is wrong, or the model does not fit the data.
    """
    base = base_config(data, checkpoint)
    chosen = base.eval.size if size is None else size
    config = Config(data=base.data, eval=dataclasses.replace(settings, size=chosen))
    config.data.root = root or config.data.root
    config.data.eval_split = split or config.data.eval_split
    validate(config)
    loaded = segmenter.load(checkpoint, output_stride=settings.output_stride)
    dataset = _first(load(config.data, config.data.eval_split), limit)
    warnings = check_fit(loaded.labels, loaded.architecture.in_channels, dataset)
    config.data.mean, config.data.std = loaded.mean, loaded.std
    evaluator = Evaluator(loaded.model, dataset, config, make_mesh(config.mesh))
    return Setup(config, loaded, dataset, evaluator, warnings)


def base_config(data: str, checkpoint: str) -> Config:
    """The config whose data section and `eval.size` an evaluation takes.

    Args:
      data: name of a data set, a config file (`x.py` or `x.py:row`), or empty for what the
        checkpoint was trained on.
      checkpoint: a workdir, or a path in it; it may also be no part of a run.

    Raises:
      UserError: nothing says which data are meant.
    """
    if config_files.is_config(data):
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


def _first(dataset: Dataset, limit: int) -> Dataset:
    """The first images of a split; 0: all."""
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
