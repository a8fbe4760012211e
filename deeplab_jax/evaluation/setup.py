"""Makes an evaluation from options of the command line: its model, its data and its settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import grain

from deeplab_jax import data as data_lib
from deeplab_jax.config import Config, DataConfig, EvalConfig, rules
from deeplab_jax.config import io as config_io
from deeplab_jax.data import DATASETS
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.distributed.mesh import make_mesh
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.inference.segmenter import Segmenter, load
from deeplab_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setup:
    """An evaluation that is ready to run.

    Attributes:
      config: of which `data` and `eval` are used.
      segmenter: the model.
      dataset: the split.
      evaluator: of the model on the split.
      warnings: from `check_compatible`.
    """

    config: Config
    segmenter: Segmenter
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
    load_split: Callable[[DataConfig, str], Dataset] = data_lib.load,
) -> Setup:
    """Loads the model and the split that a command's options name.

    Args:
      checkpoint, data: see `base_config`.
      settings: of the evaluation, except for `size`.
      root, split, size: empty or None: as in `base_config`.
      limit: largest number of images; 0: all.
      load_split: loads a split.

    Raises:
      UserError: an option, the model or the data is wrong, or the model and the data differ in
        classes or channels.
    """
    base = base_config(data, checkpoint)
    size = base.eval.size if size is None else size
    config = Config(data=base.data, eval=dataclasses.replace(settings, size=size))
    config.data.root = root or config.data.root
    config.data.eval_split = split or config.data.eval_split
    # Which output strides there are depends on the checkpoint's cascade: `load` checks it.
    _validate(
        dataclasses.replace(config, eval=dataclasses.replace(config.eval, output_stride=None))
    )
    try:
        segmenter = load(checkpoint, output_stride=settings.output_stride)
    except UserError as error:
        option = re.sub(r"^architecture \w+: output_stride", "--output-stride", str(error))
        raise UserError(option) from None
    dataset = load_split(config.data, config.data.eval_split)
    if limit:
        first: Any = grain.MapDataset.source(dataset.source)[:limit]
        dataset = dataclasses.replace(dataset, source=first)
    warnings = check_compatible(segmenter.labels, segmenter.architecture.in_channels, dataset)
    config.data.mean, config.data.std = segmenter.mean, segmenter.std
    evaluator = Evaluator(segmenter.model, dataset, config, make_mesh(config.mesh))
    return Setup(config, segmenter, dataset, evaluator, warnings)


def base_config(data: str, checkpoint: str) -> Config:
    """Returns the config whose data section and `eval.size` an evaluation uses.

    Args:
      data: name of a data set, a config as `config.io.from_python` takes it, or empty for the data
        set that the checkpoint was trained on.
      checkpoint: a workdir or a path in it, or another checkpoint.

    Raises:
      UserError: `data` is empty and the checkpoint belongs to no run.
    """
    if data not in DATASETS and config_io.is_config(data):
        return config_io.from_python(data)
    run = config_io.from_run(checkpoint)
    # A run's own settings, such as its root and its size, apply to its data set.
    if run is not None and data in ("", run.data.name):
        return run
    if not data:
        raise UserError(
            f"{checkpoint} belongs to no run of train.py, whose config.json would name its data: "
            "give --data, a data set's name or a config file"
        )
    return Config(data=DataConfig(name=data))


def _validate(config: Config) -> None:
    """Calls `rules.validate`; errors name the command's options instead of the fields."""
    try:
        rules.validate(config)
    except UserError as error:
        raise UserError(
            re.sub(r"(?:config\.)?eval\.(\w+)", lambda m: "--" + m[1].replace("_", "-"), str(error))
        ) from None


def check_compatible(model: LabelSet, num_channels: int, dataset: Dataset) -> list[str]:
    """Checks that a model and a data set have the same classes and channels.

    Args:
      model: classes of the model.
      num_channels: of the images that the model takes.
      dataset: to evaluate on.

    Returns:
      Warnings: classes of the same id whose names differ, which may be a matter of spelling.

    Raises:
      UserError: the number of classes, their order or the number of channels differs.
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
        return []  # converted weights without class names
    differing = [
        f"{index} is {one} in the checkpoint, {other} in the data"
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True))
        if one != other
    ]
    return [f"class names differ: {'; '.join(differing)}"] if differing else []
