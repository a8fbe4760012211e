"""A run of one stage or of two: the second starts from the parameters that the first ends with."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys

import jax

from deeplab_jax.config import Config, InitConfig, ModelConfig, SecondStageConfig
from deeplab_jax.config import rules as config_rules
from deeplab_jax.distributed import multihost
from deeplab_jax.models.deeplab import architecture
from deeplab_jax.training import train as loop
from deeplab_jax.training.train import Result

FIRST = "stage1"  # folder of the first stage's run, in the workdir; the second's is the workdir


def train(config: Config, workdir: str | os.PathLike[str]) -> Result:
    """Trains, stage by stage; goes on where an earlier attempt in the workdir stopped.

    With a second stage the first's run lies in the workdir's folder `stage1`, and the workdir
    itself is the second's: what a run ends with lies at the same place, however many it has.

    Args:
      config: the run.
      workdir: folder of its checkpoints, metrics and pictures; made if absent.

    Raises:
      UserError: as `loop.train`.
    """
    with multihost.raise_on_all_hosts():
        config_rules.validate(config)
        folder = loop.local_folder(workdir)
    first, second = split(config, folder)
    if second is None:
        return loop.train(first, folder)
    _say(f"stage 1 of 2, in {folder / FIRST}")
    result = loop.train(first, folder / FIRST)
    if result.stopped:
        return result
    _say(f"stage 2 of 2, in {folder}")
    return loop.train(second, folder)


def split(config: Config, folder: pathlib.Path) -> tuple[Config, Config | None]:
    """The configs of the stages, each of one stage; None where there is no second.

    The second starts from the first's last checkpoint, whichever was best.
    """
    stage = config.second_stage
    first = dataclasses.replace(config, second_stage=SecondStageConfig())
    if not stage.steps:
        return first, None
    last = folder / FIRST / "checkpoints" / str(config.train.steps)
    second = dataclasses.replace(
        first,
        model=_at_output_stride(config.model, stage.output_stride),
        data=dataclasses.replace(config.data, split=stage.split or config.data.split),
        init=InitConfig(path=str(last)),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=stage.learning_rate),
        train=dataclasses.replace(config.train, steps=stage.steps, freeze_bn=stage.freeze_bn),
    )
    return first, second


def _at_output_stride(model: ModelConfig, output_stride: int | None) -> ModelConfig:
    """The same parameters there: ASPP's rates, where the config gives them, scale with features."""
    if output_stride is None:
        return model
    rates = model.atrous_rates
    if rates is not None:
        given = architecture(
            model.architecture,
            num_classes=1,
            output_stride=model.output_stride,
            atrous_rates=tuple(rates),
        )
        rates = given.at_output_stride(output_stride).atrous_rates
    return dataclasses.replace(model, output_stride=output_stride, atrous_rates=rates)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
