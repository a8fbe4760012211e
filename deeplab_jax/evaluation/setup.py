"""Makes an evaluation from options of the command line: its model, its data and its settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deeplab_jax import data as data_lib
from deeplab_jax.config import Config, DataConfig, EvalConfig, resolve_eval, rules
from deeplab_jax.config import io as config_io
from deeplab_jax.data import DATASETS
from deeplab_jax.data.dataset import Dataset, IndexedSource
from deeplab_jax.data.labels import LabelSet
from deeplab_jax.distributed.mesh import make_mesh
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.inference.positive import resolve as resolve_positive
from deeplab_jax.inference.segmenter import Segmenter, load
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import is_bucket
from deeplab_jax.weights import hub


def prepare(
    checkpoint: str,
    data: str,
    settings: Mapping[str, Any],
    *,
    root: str = "",
    split: str = "",
    limit: int = 0,
    positive: str = "",
    threshold: float | None = None,
    calibration: str = "",
    load_split: Callable[[DataConfig, str], Dataset] = data_lib.load,
) -> tuple[Config, Segmenter, Evaluator, list[str]]:
    """Loads the model and the split that a command's options name; errors name the options.

    Args:
      checkpoint, data, root, split: see `base_config`.
      settings: fields of `EvalConfig` that differ from `eval_config`.
      limit: largest number of images; 0: all.
      positive, threshold: see `inference.positive.resolve`.
      calibration: see `inference.segmenter.load`; empty: the default.
      load_split: loads a split.

    Returns:
      The config, of which `data` and `eval` are used, the model, its evaluator on the split, and
      the warnings of `check_compatible`.

    Raises:
      UserError: an option, the model or the data is wrong, or they do not belong together.
    """
    if is_bucket(checkpoint):  # copied once, for its config and its arrays
        checkpoint = str(hub.find_weights(checkpoint))
    base = base_config(data, checkpoint, root, split)
    config = Config(data=base.data, eval=eval_config(checkpoint, base, settings))
    # Which output strides there are depends on the checkpoint's cascade: `load` checks it.
    stride, config.eval.output_stride = config.eval.output_stride, None
    try:
        rules.validate(config)
        ours = config.eval = dataclasses.replace(resolve_eval(config), output_stride=stride)
        segmenter = load(
            checkpoint,
            output_stride=stride,
            scales=ours.scales,
            flip=ours.flip,
            window=ours.window if ours.protocol == "native" else ours.window or None,
            overlap=ours.overlap,
            calibration=calibration or None,
        )
    except UserError as error:
        text = re.sub(r"^architecture \w+: output_stride", "--output-stride", str(error))
        field = re.compile(r"(?:config\.)?eval\.(\w+)")
        raise UserError(field.sub(lambda m: "--" + m[1].replace("_", "-"), text)) from None
    dataset = _first(load_split(config.data, config.data.eval_split), limit)
    warnings = check_compatible(segmenter.labels, segmenter.architecture.in_channels, dataset)
    chosen = resolve_positive(dataset.labels, positive, threshold)
    config.data.mean, config.data.std = segmenter.mean, segmenter.std
    evaluator = Evaluator(segmenter.model, dataset, config, make_mesh(config.mesh), chosen)
    return config, segmenter, evaluator, warnings


def load_data(
    data: str, checkpoint: str, *, root: str = "", split: str = "", limit: int = 0
) -> tuple[DataConfig, Dataset]:
    """Loads the split that a command's options name, without a model; see `prepare`."""
    config = Config(data=base_config(data, checkpoint, root, split).data)
    rules.validate(config)
    return config.data, _first(data_lib.load(config.data, config.data.eval_split), limit)


def _first(dataset: Dataset, limit: int) -> Dataset:
    """Returns the first images of a split; limit 0: all."""
    if not limit:
        return dataset
    first = np.arange(min(limit, len(dataset.source)))
    return dataclasses.replace(dataset, source=IndexedSource(dataset.source, first))


def training_warning(checkpoint: str, config: DataConfig) -> list[str]:
    """Returns a warning if a model was trained on the split `eval_split`, as its name tells."""
    run = config_io.from_run(checkpoint)
    if run is not None and (run.data.name, run.data.root) != (config.name, config.root):
        return []
    trained, split = "train" if run is None else run.data.split, config.eval_split
    if split not in trained and split not in ("train", "trainval", "trainaug"):
        return []
    perhaps = "" if run else ", by its name,"
    return [
        f"the model was{perhaps} trained on the split {split}, where it is right more often than "
        "on new images. So the temperatures and the risk do not hold: give another --split"
    ]


def eval_config(checkpoint: str, base: Config, settings: Mapping[str, Any]) -> EvalConfig:
    """Returns how a checkpoint's run was evaluated, with some fields set.

    Without a run, the result has the defaults and the size of `base`, of `base_config`. A window
    and the protocol "paper" exclude each other: the one that is set replaces the other.
    """
    run = config_io.from_run(checkpoint)
    result = EvalConfig(size=base.eval.size) if run is None else run.eval
    if settings.get("window") and result.protocol == "paper":
        result = dataclasses.replace(result, protocol="auto")
    if settings.get("protocol") == "paper":
        result = dataclasses.replace(result, window=None)
    return dataclasses.replace(result, num_pictures=0, **settings)


def base_config(data: str, checkpoint: str, root: str = "", split: str = "") -> Config:
    """Returns the config whose data section an evaluation uses.

    `data` is the name of a data set, a config as `config.io.from_python` takes it, or empty for the
    data set of the checkpoint's run; empty `root` and `split` are those of the config.

    Raises:
      UserError: `data` is empty and the checkpoint belongs to no run.
    """
    if data not in DATASETS and config_io.is_config(data):
        config = config_io.from_python(data)
    elif (run := config_io.from_run(checkpoint)) is not None and data in ("", run.data.name):
        config = run  # whose settings, such as the root, apply to its data set
    elif data:
        config = Config(data=DataConfig(name=data))
    else:
        raise UserError(
            f"{checkpoint} belongs to no run of train.py, whose config.json would name its data: "
            "give --data, a data set's name or a config file"
        )
    config.data.root = root or config.data.root
    config.data.eval_split = split or config.data.eval_split
    return config


def check_compatible(model: LabelSet, num_channels: int, dataset: Dataset) -> list[str]:
    """Checks that a model, of these classes and channels, and a data set belong together.

    Returns warnings about classes of one id whose names differ, perhaps in spelling.

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
