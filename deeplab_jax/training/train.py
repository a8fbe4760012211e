"""The main job: `train(config, workdir)`, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from deeplab_jax import config as config_lib
from deeplab_jax import data as data_lib
from deeplab_jax.config import Config
from deeplab_jax.config import rules as config_rules
from deeplab_jax.data import oversampling as duplication
from deeplab_jax.data import pipeline
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.distributed import multihost
from deeplab_jax.distributed.preemption import PreemptionHandler
from deeplab_jax.evaluation.evaluator import Evaluation, Evaluator
from deeplab_jax.inference.compile import use_compilation_cache
from deeplab_jax.models.architecture import Architecture, architecture
from deeplab_jax.models.functional import FunctionalModel
from deeplab_jax.training import class_weights
from deeplab_jax.training.checkpoint import Checkpoints
from deeplab_jax.training.program import TrainProgram, train_program
from deeplab_jax.training.progress import Progress
from deeplab_jax.training.state import TrainState, start_state
from deeplab_jax.training.step import Metrics
from deeplab_jax.training.writer import Writer
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.files import write_bytes
from deeplab_jax.visualization.image_grid import prediction_grid
from deeplab_jax.weights import initialize
from deeplab_jax.weights.saved_model import check_format, describe

PICTURE = "predictions"


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` ends with.

    Attributes:
      step: steps made.
      miou: of the evaluation at that step, None if it was stopped before.
      picture: the last picture of predictions, if one was made.
      stopped: whether a signal ended the run before its last step.
    """

    step: int
    miou: float | None
    picture: pathlib.Path | None
    stopped: bool


def train(config: Config, workdir: str | os.PathLike[str]) -> Result:
    """Trains one stage, evaluates and saves; goes on where an earlier attempt stopped.

    At each step, in this order: evaluate, save, next batch, step, log. What happens at a step
    follows from (config, seed, step, arrays) alone, so that a run that was killed ends with the
    arrays of one that was not.

    Args:
      config: the run.
      workdir: folder of its checkpoints, metrics and pictures; made if absent.

    Raises:
      UserError: if the config, the data or the workdir is wrong; if the loss is not finite.
    """
    is_writer = jax.process_index() == 0
    use_compilation_cache()
    with multihost.raise_on_all_hosts():
        config_rules.validate(config)
        folder = local_folder(workdir)
        mesh = mesh_lib.make_mesh(config.mesh)
        batch_size, accumulate = config.train.batch_size, config.optimizer.accumulate
        mesh_lib.check_batch("config.train.batch_size", batch_size, mesh, accumulate)
        train_set = data_lib.load(config.data, config.data.split)
        eval_set = data_lib.load(config.data, config.data.eval_split)
        model = FunctionalModel(resolve_architecture(config, train_set))
        height, stride = config_lib.crop_shape(config.data)[0], model.architecture.output_stride
        mesh_lib.check_height("config.data.crop_size", height, stride, mesh)
        check_workdir(folder, config)
        train_set = duplication.apply(config.data, train_set, quiet=not is_writer)
    multihost.check(config, {config.data.split: train_set, config.data.eval_split: eval_set})
    with multihost.raise_on_all_hosts():
        if is_writer:
            claim_workdir(folder, config)
    multihost.check_shared(folder)
    with multihost.raise_on_all_hosts():
        loss = class_weights.resolve(config.loss, train_set, quiet=not is_writer)

    program = train_program(model, dataclasses.replace(config, loss=loss), mesh)
    evaluator = Evaluator(model, eval_set, config, mesh)
    info = describe(
        model.architecture,
        train_set.labels,
        mean=config.data.mean,
        std=config.data.std,
        resize="random scale, bilinear, half-pixel centres",
        size=config_lib.crop_shape(config.data),
    )

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(config.train, enabled=is_writer))
        checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.train.keep, log=progress.message
        )
        stack.callback(checkpoints.close)  # waits for a save under way, whatever ends the run
        state, start, miou = restore_or_start(config, model, program, checkpoints, progress)
        progress.describe(config, model, train_set, eval_set, mesh, start)
        writer = stack.enter_context(Writer(folder, start_step=start, enabled=is_writer))
        stop = stack.enter_context(PreemptionHandler())
        batches: Iterator[pipeline.Batch] = stack.enter_context(
            pipeline.train_batches(
                train_set,
                config.data,
                batch_size=batch_size,
                seed=config.seed,
                start_step=start,
                rows=mesh_lib.local_rows(mesh, batch_size),
            )
            if start < config.train.steps
            else contextlib.nullcontext(iter(()))
        )
        log = StepLog(config, writer, progress)
        step, picture = start, None
        while True:
            if step > start:
                miou = None
            stopping = stop.should_stop()
            if miou is None and due(step, config.train.eval_every, config) and not stopping:
                log.flush()
                evaluation = progress.evaluate(evaluator, state.eval_variables, step, stop)
                stopping = evaluation is None
                if evaluation is not None:
                    miou = evaluation.scores.miou
                    picture = report(evaluation, eval_set, step, writer, progress)
                log.restart_clock()

            last = step == config.train.steps or stopping
            if step > start and (
                last or miou is not None or due(step, config.train.save_every, config)
            ):
                log.flush()  # a state whose loss was not finite is never saved
                checkpoints.save(state, step, info, miou, wait=last)
            if last:
                break

            with log.waiting_for_data():
                batch = mesh_lib.to_global(next(batches), mesh, batch_size)
            with jax.transfer_guard("disallow"):
                state, metrics = program.step(state, batch)
            step += 1
            log.add(step, metrics)
        stopped = stopping and step < config.train.steps
        if stopped:
            progress.message(f"stopped by {stop.name} at step {step}; saved. Run again to go on.")
        if picture is None:  # a finished run that was run again
            earlier = writer.picture_path(step, PICTURE)
            picture = earlier if earlier.exists() else None
    return Result(step, miou, picture, stopped)


def due(step: int, every: int, config: Config) -> bool:
    """Whether something done each `every` steps, and at the last, is to be done after `step`."""
    return step == config.train.steps or (every > 0 and step > 0 and step % every == 0)


def resolve_architecture(config: Config, dataset: Dataset) -> Architecture:
    """The config's architecture for a data set's classes and channels."""
    fields = dataclasses.asdict(config.model)
    name = fields.pop("architecture")
    classes = fields.pop("num_classes")
    if classes is not None and classes != dataset.labels.num_classes:
        raise UserError(
            f"config.model.num_classes = {classes}, but the data set has "
            f"{dataset.labels.num_classes} classes; leave it None to take the data set's"
        )
    if len(config.data.mean) != dataset.num_channels:
        raise UserError(
            f"config.data.mean has {len(config.data.mean)} numbers, but images have "
            f"{dataset.num_channels} channels"
        )
    try:
        return architecture(
            name,
            num_classes=dataset.labels.num_classes,
            in_channels=dataset.num_channels,
            **fields,
        )
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error


def local_folder(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """The workdir as an absolute path.

    Raises:
      UserError: it is a bucket's address; as a path that would be a folder named "gs:" here.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(workdir)):
        raise UserError(
            f"--workdir {workdir} is not a folder: mount the bucket as one (gcsfuse, mount-s3), "
            "at the same path on all hosts, and give that path"
        )
    return pathlib.Path(workdir).absolute()


def check_workdir(folder: pathlib.Path, config: Config) -> None:
    """Looks whether a workdir is free, or holds a run of this config.

    Raises:
      UserError: if the folder holds another run, naming the fields that differ.
    """
    path = folder / "config.json"
    saved = folder / "checkpoints"
    if not (saved.is_dir() and any(child.name.isdigit() for child in saved.iterdir())):
        return  # a run that came to no checkpoint, for a mistake in its config say, binds nobody
    check_format(folder)
    if not path.exists():
        raise UserError(f"{folder} holds checkpoints but no config.json; choose another --workdir")
    try:
        theirs = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); choose another --workdir") from error
    differing = config_lib.differences(config, theirs)
    if differing:
        lines = "\n".join(f"  config.{line}" for line in differing)
        raise UserError(
            f"{folder} holds a run with another config:\n{lines}\n"
            "Choose another --workdir, or run with the config that lies there."
        )


def claim_workdir(folder: pathlib.Path, config: Config) -> None:
    """Makes a workdir, and writes the config into it.

    Raises:
      UserError: if that cannot be done.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "config.json", config_lib.to_json(config).encode())
    except OSError as error:
        raise UserError(f"cannot write to --workdir {folder}: {error.strerror}") from error


def restore_or_start(
    config: Config,
    model: FunctionalModel,
    program: TrainProgram,
    checkpoints: Checkpoints,
    progress: Progress,
) -> tuple[TrainState, int, float | None]:
    """The newest whole checkpoint's state, step and mIoU; or a new state, 0 and None."""
    restored = checkpoints.restore(
        jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            program.state,
            program.where,
        )
    )
    if restored is not None:
        return restored.state, restored.step, restored.miou
    variables = initialize.variables(config, model, log=progress.message)
    # Born with its sharding, so that the first step compiles for what all later ones are given.
    ema = config.optimizer.ema_decay > 0
    start = jax.jit(lambda v: start_state(program.tx, v, ema=ema), out_shardings=program.where)
    return start(mesh_lib.place(variables, program.where.variables)), 0, None


class StepLog:
    """Gathers the metrics of steps without waiting for the device, and writes them in turn."""

    def __init__(self, config: Config, writer: Writer, progress: Progress) -> None:
        self._config = config
        self._writer = writer
        self._progress = progress
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time of its body as waiting, if the device had run out of work at its end."""
        begin = time.perf_counter()
        yield
        if all(metrics["loss"].is_ready() for _, metrics in self._pending[-1:]):
            self._waited += time.perf_counter() - begin

    def add(self, step: int, metrics: Metrics) -> None:
        self._pending.append((step, metrics))
        self._steps += 1
        # One step runs while the next is prepared; more would only fill the memory with batches.
        jax.block_until_ready([metrics for _, metrics in self._pending[-2:-1]])
        if step % self._config.train.log_every == 0 or step == 1:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending.

        Raises:
          UserError: if a loss or gradient is not finite, naming the step.
        """
        if not self._pending:
            return
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        self._pending = []
        for step, metrics in fetched:
            if not all(np.isfinite(value) for value in metrics.values()):
                raise UserError(_not_finite(step, metrics))
        elapsed = time.perf_counter() - self._since
        images = self._steps * self._config.train.batch_size
        step = fetched[-1][0]
        values = {
            name: float(np.mean([metrics[name] for _, metrics in fetched]))
            for name in fetched[-1][1]
        }
        values["learning_rate"] = float(fetched[-1][1]["learning_rate"])
        values["images_per_second"] = images / elapsed
        values["data_wait_share"] = self._waited / elapsed
        self._writer.scalars(step, values)
        self._progress.step(step, values)
        self.restart_clock()


def _not_finite(step: int, metrics: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {float(value):g}" for name, value in metrics.items())
    return (
        f"step {step} is not finite: {values}. Nothing after the last good checkpoint was saved. "
        "Lower config.optimizer.learning_rate, add config.optimizer.warmup_steps or "
        "config.optimizer.clip_norm, and use another --workdir."
    )


def report(
    evaluation: Evaluation, dataset: Dataset, step: int, writer: Writer, progress: Progress
) -> pathlib.Path | None:
    """Writes an evaluation's scores and its picture; the path of the picture."""
    scores = evaluation.scores
    names = dataset.labels.names
    writer.scalars(
        step,
        {
            "eval/miou": scores.miou,
            "eval/pixel_accuracy": scores.pixel_accuracy,
            "eval/mean_accuracy": scores.mean_accuracy,
            "eval/images": evaluation.images,
        }
        | {f"eval/iou/{n}": float(v) for n, v in zip(names, scores.per_class_iou, strict=True)},
    )
    picture = None
    if evaluation.predictions:
        rows = [(p.name, p.image, p.label, p.ids) for p in evaluation.predictions]
        picture = writer.picture(step, PICTURE, prediction_grid(rows, dataset.labels))
    absent = [n for n, v in zip(names, scores.per_class_iou, strict=True) if math.isnan(v)]
    progress.evaluated(step, scores, evaluation.images, absent, picture)
    return picture
