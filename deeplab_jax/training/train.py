"""Training: `train(config, workdir)`, written to be read from top to bottom.

A run has one stage, or two: the second starts from the parameters with which the first ends.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deeplab_jax import config as config_lib
from deeplab_jax import data as data_lib
from deeplab_jax.config import Config, InitConfig, ModelConfig, SecondStageConfig, rules
from deeplab_jax.data import oversampling, pipeline, statistics
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.distributed import multihost
from deeplab_jax.distributed.preemption import PreemptionHandler
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.inference.compilation import compile_in_thread, use_compilation_cache
from deeplab_jax.models.architecture import Architecture, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training import class_weights
from deeplab_jax.training.checkpoint import Checkpoints
from deeplab_jax.training.logging import PREDICTIONS, MetricWriter, Progress, StepLog
from deeplab_jax.training.provenance import MADE_WITH, Provenance, check_resume, provenance
from deeplab_jax.training.receipt import ReceiptWriter, start_facts
from deeplab_jax.training.state import TrainState, abstract_state, init_state, shardings_of
from deeplab_jax.training.step import TrainStep, make_train_step
from deeplab_jax.training.workdir import (
    PIXELS,
    Inputs,
    Workdir,
    check_workdir,
    claim_workdir,
    lock_workdir,
    open_workdir,
    portable,
    update_copies,
)
from deeplab_jax.utils.errors import UserError, print_warning
from deeplab_jax.weights import initialize
from deeplab_jax.weights.saved_model import describe

if TYPE_CHECKING:
    from deeplab_jax.buckets.run import BucketRun

FIRST_STAGE = "stage1"  # folder of the first of two stages; the second's is the workdir itself


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of `train`.

    Attributes:
      step: number of steps taken.
      miou: mean IoU after that step, or None if the run was stopped before its evaluation.
      picture: path or address of the last picture of predictions, or an empty text.
      stopped: whether a signal ended the run before its last step.
    """

    step: int
    miou: float | None
    picture: str
    stopped: bool


def train(
    config: Config, workdir: str | os.PathLike[str], *, bucket_timeout: float = 600
) -> Result:
    """Trains, evaluates and saves; resumes where an earlier attempt in the workdir stopped.

    Of two stages, the first runs in the workdir's folder `stage1` and the second in the workdir
    itself, so that the final checkpoints are always in the same place.

    Args:
      config: the run.
      workdir: folder for checkpoints, metrics and pictures, created if absent; or its address in a
        bucket, `gs://bucket/run` or `s3://bucket/run` (docs/pods.md).
      bucket_timeout: seconds without the bucket after which the run saves locally and ends.

    Raises:
      UserError: the config, the data or the workdir is wrong, or the loss is not finite.
    """
    with multihost.raise_on_all_hosts():
        rules.validate(config)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            open_workdir(workdir, bucket_timeout=bucket_timeout, log=_print)
        )
        folder = opened.path
        first, second = stage_configs(config, opened.address)
        if second is None:
            return train_stage(first, opened, folder)
        with multihost.raise_on_all_hosts():
            try:  # before the first stage takes its time
                check_workdir(opened, folder, second, {})
            except UserError as error:
                raise UserError(f"stage 2 of 2: {error}") from error
            if jax.process_index() == 0:
                stack.enter_context(lock_workdir(folder / FIRST_STAGE))
        _print(f"stage 1 of 2, in {opened.shown(folder / FIRST_STAGE)}")
        result = train_stage(first, opened, folder / FIRST_STAGE)
        if result.stopped:
            return result
        update_copies(opened)
        _print(f"stage 2 of 2, in {opened.address}")
        return train_stage(second, opened, folder)


def train_stage(config: Config, workdir: Workdir | BucketRun, folder: pathlib.Path) -> Result:
    """Trains one stage in its folder, that of the workdir or one in it.

    The order at each step is: evaluate, save, next batch, step, log. Every step is a function of
    (config, seed, step, arrays), so a run that was killed and resumed ends with the same arrays as
    one that was not.
    """
    parts = set_up(config, workdir, folder)
    config, model, train_set, eval_set, mesh, *_ = parts
    compiled_step = functools.cache(lambda: compile_step(config, model, mesh))
    evaluator = Evaluator(model, eval_set, config, mesh)
    info = describe(
        model.architecture,
        train_set.labels,
        mean=config.data.mean,
        std=config.data.std,
        resize="random scale, bilinear, half-pixel centres",
        size=config_lib.crop_shape(config.data),
    )
    info[MADE_WITH] = parts.origin.info
    is_writer = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(config.train, enabled=is_writer))
        checkpoints = Checkpoints(
            folder / "checkpoints",
            keep=config.train.keep,
            log=progress.message,
            is_copied=workdir.is_copied,
        )
        stack.callback(checkpoints.close)  # waits for a save in progress, however the run ends
        if checkpoints.steps[-1:] != [config.train.steps]:
            compiled_step()  # while the state is made and workers start
        state, step, miou = restore_or_init(parts, checkpoints, progress.message)
        progress.describe(parts, step)
        writer = stack.enter_context(MetricWriter(folder, config, step, enabled=is_writer))
        stop = stack.enter_context(PreemptionHandler())
        batches = stack.enter_context(train_batches(config, train_set, mesh, step))
        recorded = parts._replace(config=portable(config, workdir.address))
        receipt = ReceiptWriter(folder, config, mesh, start_facts(recorded, step))
        log = StepLog(config.train, writer, progress, receipt.flush)
        start, picture = step, ""
        while True:
            if workdir.is_failing:
                stop.request()
            stopping = stop.should_stop()
            if miou is None and not stopping and is_due(step, config.train.eval_every, config):
                log.flush()
                evaluation = progress.evaluate(evaluator, state.eval_variables, step, stop)
                stopping = evaluation is None
                if evaluation is not None:
                    miou = evaluation.scores.miou
                    path = writer.write_evaluation(step, evaluation)
                    picture = workdir.shown(path) if path else ""
                    progress.evaluated(step, evaluation, picture)
                log.restart_clock()

            last = step == config.train.steps or stopping
            save = last or miou is not None or is_due(step, config.train.save_every, config)
            receipt.add_state(step, state, is_due=save)
            if save and step > start:
                log.flush()  # raises on a non-finite loss, so that such a state is never saved
                checkpoints.save(state, step, info, miou, wait=last)
            if last:
                break

            with log.waiting_for_data():
                batch = mesh_lib.to_global(next(batches), mesh, config.train.batch_size)
            step, miou = step + 1, None
            with jax.transfer_guard("disallow"):
                digest = receipt.digest_batch(batch)
                state, metrics = compiled_step().result()(state, batch)
            receipt.add_step(step, digest, metrics)
            log.add(step, metrics)
        stopped = stopping and step < config.train.steps
        if stopped:
            progress.message(f"stopped by {stop.name} at step {step}; saved. Run again to go on.")
        path = writer.image_path(step, PREDICTIONS)
        if not picture and not stopped and workdir.exists(path):  # of a finished run that ran again
            picture = workdir.shown(path)
    return Result(step, miou, picture, stopped)


class Parts(NamedTuple):
    """The parts of a stage."""

    config: Config  # `set_up` makes its class weights numbers
    model: FunctionalModel
    train_set: Dataset  # with oversampling applied
    eval_set: Dataset
    mesh: Mesh
    inputs: Inputs  # see `summarize_split`
    origin: Provenance


def set_up(config: Config, workdir: Workdir | BucketRun, folder: pathlib.Path) -> Parts:
    """Validates a stage, loads its data and claims its folder.

    Raises:
      UserError: on all hosts, if any host finds a mistake or hosts disagree.
    """
    is_writer = jax.process_index() == 0
    with multihost.raise_on_all_hosts():
        parts = load_parts(
            config,
            lambda inputs: check_workdir(workdir, folder, config, inputs),
            quiet=not is_writer,
        )
    fields = {
        f"config.{name}": value
        for name, value in config_lib.flatten(config).items()
        if name not in config_lib.DATA_PATHS
    }
    multihost.check_equal(fields | parts.inputs | parts.origin.facts)
    with multihost.raise_on_all_hosts():
        if is_writer:
            claim_workdir(workdir, folder, config, parts.inputs)
    if not workdir.is_copied:
        multihost.check_shared(folder)
    with multihost.raise_on_all_hosts():
        loss = class_weights.resolve(config.loss, parts.train_set, quiet=not is_writer)
    return parts._replace(config=dataclasses.replace(config, loss=loss))


def load_parts(config: Config, check: Callable[[Inputs], None], *, quiet: bool) -> Parts:
    """Validates a stage and loads its data; writes nothing.

    Calls `check` with what identifies the data, before work that takes long.

    Raises:
      UserError: there is a mistake in the config or the data; or as `check`.
    """
    use_compilation_cache()
    rules.validate(config)
    mesh = mesh_lib.make_mesh(config.mesh)
    mesh_lib.check_batch(
        "config.train.batch_size", config.train.batch_size, mesh, config.optimizer.accumulate
    )
    train_set = data_lib.load(config.data, config.data.split)
    eval_set = data_lib.load(config.data, config.data.eval_split)
    for note in () if quiet else dict.fromkeys((*train_set.notes, *eval_set.notes)):
        _print(f"data: {note}")
    model = FunctionalModel(resolve_architecture(config, train_set))
    height, stride = config_lib.crop_shape(config.data)[0], model.architecture.output_stride
    mesh_lib.check_height("config.data.crop_size", height, stride, mesh)
    splits = {config.data.split: train_set, config.data.eval_split: eval_set}
    inputs: Inputs = {}
    for split, dataset in splits.items():
        inputs |= summarize_split(config, split, dataset, quiet=quiet)
    check(inputs)
    train_set = oversampling.apply(config.data, train_set, quiet=quiet)
    origin = provenance(config, train_set)
    return Parts(config, model, train_set, eval_set, mesh, inputs, origin)


def summarize_split(config: Config, split: str, dataset: Dataset, *, quiet: bool) -> Inputs:
    """Returns what identifies a split, by a sample of it; warns of what looks wrong with it.

    Raises:
      UserError: the split has no valid pixel, or an example is damaged.
    """
    is_train = split == config.data.split
    crop = config_lib.crop_shape(config.data) if is_train else None
    summary = statistics.summarize_sample(dataset, crop)
    warnings = statistics.check_valid_pixels(dataset, summary, split)
    pixels = summary.pixels.tolist()
    imbalance = statistics.describe_imbalance(dataset.labels.names, pixels, config.loss)
    if imbalance and is_train:
        warnings.append(f"{imbalance}. {statistics.MEND_IMBALANCE}")
    for warning in () if quiet else warnings:
        print_warning(warning)
    return {
        f"classes of {split}": list(summary.class_names),
        f"number of images of {split}": summary.num_examples,
        f"names and labels of {split} (digest of some)": summary.label_digest,
        f"{PIXELS} of {split} (digest of some)": summary.image_digest,
    }


def restore_or_init(
    parts: Parts, checkpoints: Checkpoints, log: Callable[[str], None]
) -> tuple[TrainState, int, float | None]:
    """Restores the newest intact checkpoint, or initializes; returns state, step and mIoU.

    Raises:
      UserError: no checkpoint can be read, or `train.strict_resume` refuses it.
    """
    config, model = parts.config, parts.model
    abstract = abstract_state(config, model, parts.mesh)
    restored = checkpoints.restore(abstract)
    if restored is None:
        return first_state(config, model, shardings_of(abstract), log), 0, None
    with multihost.raise_on_all_hosts():
        if restored.step < config.train.steps and jax.process_index() == 0:
            strict = config.train.strict_resume
            check_resume(parts.origin, restored.info, restored.step, strict=strict)
    return restored.state, restored.step, restored.miou


def first_state(
    config: Config, model: FunctionalModel, shardings: TrainState, log: Callable[[str], None]
) -> TrainState:
    """Returns the state before the first step, on the devices of its shardings."""
    variables = initialize.init_variables(config, model, log=log)
    state = initialize.on_host(functools.partial(init_state, config), lambda: variables)
    return mesh_lib.device_put(state, shardings)


def compile_step(
    config: Config, model: FunctionalModel, mesh: Mesh
) -> concurrent.futures.Future[TrainStep]:
    """Starts to compile the training step in a thread."""
    step: Any = make_train_step(model, config, mesh)
    height, width = config_lib.crop_shape(config.data)
    shape = config.train.batch_size, mesh_lib.padded_height(height, mesh), width
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, model.architecture.in_channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct(shape, jnp.uint8),
    }
    # Lowered here, because a thread would not see JAX's settings by context.
    return compile_in_thread(step.lower(abstract_state(config, model, mesh), batch))


def train_batches(
    config: Config, dataset: Dataset, mesh: Mesh, start_step: int
) -> contextlib.AbstractContextManager[Iterator[pipeline.Batch]]:
    """This process's rows of the batches from `start_step` on; empty after the last step."""
    if start_step >= config.train.steps:
        return contextlib.nullcontext(iter(()))
    return pipeline.train_batches(
        dataset,
        config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        rows=mesh_lib.local_rows(mesh, config.train.batch_size),
    )


def is_due(step: int, every: int, config: Config) -> bool:
    """Whether an action that runs every `every` steps, and after the last, runs after `step`."""
    return step == config.train.steps or (every > 0 and step > 0 and step % every == 0)


def resolve_architecture(config: Config, dataset: Dataset) -> Architecture:
    """Returns the config's architecture with the classes and channels of a data set.

    Raises:
      UserError: the config contradicts itself or the data set.
    """
    fields = dataclasses.asdict(config.model)
    name = fields.pop("architecture")
    num_classes = fields.pop("num_classes")
    if num_classes is not None and num_classes != dataset.labels.num_classes:
        raise UserError(
            f"config.model.num_classes = {num_classes}, but the data set has "
            f"{dataset.labels.num_classes} classes; leave it None to take the data set's"
        )
    try:
        chosen = architecture(
            name,
            num_classes=dataset.labels.num_classes,
            in_channels=dataset.num_channels,
            **fields,
        )
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error
    if not config.loss.upsample and chosen.decoder != "bilinear":
        raise UserError(
            f"config.loss.upsample must be true with decoder = {chosen.decoder} of {name}, which "
            "itself upsamples the logits"
        )
    return chosen


def stage_configs(config: Config, workdir: str) -> tuple[Config, Config | None]:
    """Splits a run into configs of one stage each; the second is None if there is one stage.

    The second stage starts from the first's last checkpoint, even if an earlier one scored better.
    """
    stage = config.second_stage
    first = dataclasses.replace(config, second_stage=SecondStageConfig())
    if not stage.steps:
        return first, None
    last = f"{workdir}/{FIRST_STAGE}/checkpoints/{config.train.steps}"
    second = dataclasses.replace(
        first,
        model=_at_output_stride(config.model, stage.output_stride),
        data=dataclasses.replace(config.data, split=stage.split or config.data.split),
        init=InitConfig(path=last),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=stage.learning_rate),
        train=dataclasses.replace(config.train, steps=stage.steps, freeze_bn=stage.freeze_bn),
    )
    return first, second


def _at_output_stride(model: ModelConfig, output_stride: int | None) -> ModelConfig:
    """The same parameters at another output stride; given rates scale with the features."""
    if output_stride is None:
        return model
    changes: dict[str, Any] = {"output_stride": output_stride}
    rates = [field for field in ("atrous_rates", "multi_grid") if getattr(model, field)]
    if rates:
        fields = ("output_stride", "cascade", "dilation_rule", *rates)
        options = {field: getattr(model, field) for field in fields}
        given = architecture(model.architecture, num_classes=1, **options)
        there = given.at_output_stride(output_stride)
        changes |= {field: getattr(there, field) for field in rates}
    return dataclasses.replace(model, **changes)


def _print(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
