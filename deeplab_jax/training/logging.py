"""What a run reports: lines on the terminal, metrics.jsonl, pictures, and to its loggers."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
import rich.console
import rich.progress
from jaxtyping import UInt8

from deeplab_jax.config import LOGGERS, Config, TrainConfig, crop_shape
from deeplab_jax.distributed.preemption import PreemptionHandler
from deeplab_jax.evaluation.evaluator import Evaluator
from deeplab_jax.evaluation.tally import Evaluation
from deeplab_jax.models.functional import Variables
from deeplab_jax.training.step import Metrics
from deeplab_jax.utils.errors import UserError, first_line, print_warning
from deeplab_jax.utils.files import write_bytes, write_png
from deeplab_jax.visualization.overlays import prediction_grid

if TYPE_CHECKING:
    from deeplab_jax.training.train import Parts

PREDICTIONS = "predictions"  # name of the pictures of an evaluation


class Progress:
    """Progress on stderr: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, config: TrainConfig, *, enabled: bool) -> None:
        self._steps, self._batch_size, self._enabled = config.steps, config.batch_size, enabled
        self._console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = enabled and self._console.is_terminal
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[detail]}"),
            console=self._console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task("train", total=self._steps, detail="compiling")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._enabled:
            self._console.print(text, markup=False)

    def describe(self, parts: Parts, start: int) -> None:
        """Prints the model, the data and the steps of the run in three lines."""
        config, arch, mesh = parts.config, parts.model.architecture, parts.mesh
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(parts.model.abstract.params))
        height, width = crop_shape(config.data)
        self.message(
            f"{config.model.architecture}: {num_parameters:,} parameters, output stride "
            f"{arch.output_stride}, {arch.num_classes} classes, {arch.dtype}"
        )
        self.message(
            f"{config.data.name}: {len(parts.train_set.source):,} images to train on "
            f"({config.data.split}), {len(parts.eval_set.source):,} to evaluate on "
            f"({config.data.eval_split})"
        )
        self.message(
            f"{config.train.steps:,} steps of {config.train.batch_size} crops {height}x{width} on "
            f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
            + (f", from step {start:,}" if start else "")
        )
        self._bar.update(self._task, completed=start)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Shows the metrics of a logged step."""
        detail = (
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"{values['images_per_second']:.1f} images/s  "
            f"data wait {values['data_wait_share']:.0%}"
        )
        if self._live:
            self._bar.update(self._task, completed=step, detail=detail)
            return
        if step > 1:  # the first step's time is compilation
            seconds = (self._steps - step) * self._batch_size / values["images_per_second"]
            detail += f"  {datetime.timedelta(seconds=round(seconds))} left"
        self.message(f"step {step}/{self._steps}  {detail}")

    def evaluate(
        self, evaluator: Evaluator, variables: Variables, step: int, stop: PreemptionHandler
    ) -> Evaluation | None:
        """Evaluates under its own bar; returns None if a signal stopped the evaluation."""
        task = self._bar.add_task("evaluate", total=evaluator.num_batches, detail=f"at step {step}")
        try:
            return evaluator.evaluate(
                variables, progress=lambda: self._bar.advance(task), should_stop=stop.should_stop
            )
        finally:
            self._bar.remove_task(task)

    def evaluated(self, step: int, evaluation: Evaluation, picture: str) -> None:
        """Prints the scores of an evaluation."""
        scores = evaluation.scores
        ious = zip(evaluation.labels.names, scores.per_class_iou, strict=True)
        absent = [name for name, iou in ious if math.isnan(iou)]
        without = f" (without {', '.join(absent)}: absent)" if absent else ""
        positive = evaluation.positive_scores
        f1 = f"F1 {positive.f1:.4f}  " if positive else ""
        shown = f"  {picture}" if picture else ""
        self.message(
            f"step {step}/{self._steps}  mIoU {scores.miou:.4f}{without}  "
            f"{f1}pixel accuracy {scores.pixel_accuracy:.4f}  "
            f"on {evaluation.num_images} images{shown}"
        )


class Logger(Protocol):
    """Where a run's metrics and pictures go, besides metrics.jsonl and pictures/.

    An entry of `config.LOGGERS` is called with the folder of the stage, the config, and the
    step from which the run starts or resumes; what was logged after that step is logged again.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs finite numbers by name, such as "loss" and "eval/miou"."""

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Logs an RGB picture."""

    def close(self) -> None:
        """Ends the run."""


class TensorBoard:
    """The `Logger` "tensorboard": event files in the folder `tensorboard`."""

    def __init__(self, folder: pathlib.Path, config: Config, start_step: int) -> None:
        # Imported here because it imports PyTorch where that is installed, which takes seconds.
        from tensorboardX import SummaryWriter

        purge_step = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        self.close = self._writer.close

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")


class MetricWriter:
    """Writes metrics and pictures under a workdir; only the first process writes.

    A logger that raises is left out from then on, with a warning.
    """

    def __init__(
        self, workdir: pathlib.Path, config: Config, start_step: int, *, enabled: bool
    ) -> None:
        """Opens the files and drops entries of an earlier attempt past `start_step`."""
        self._workdir, self._enabled = workdir, enabled
        self._loggers: dict[str, Logger] = {}
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        drop_after(path, start_step)
        self._jsonl = path.open("a", buffering=1)
        for name in config.train.loggers:
            with self._drop_failing(name):
                self._loggers[name] = LOGGERS[name](workdir, config, start_step)

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl, with null for NaN, and calls the loggers."""
        if self._enabled:
            finite = {name: value for name, value in values.items() if np.isfinite(value)}
            self._jsonl.write(json.dumps({"step": step} | dict.fromkeys(values) | finite) + "\n")
            self._call("scalars", step, finite)

    def write_image(self, step: int, name: str, image: np.ndarray) -> pathlib.Path | None:
        """Writes a uint8 RGB picture to `image_path`, calls the loggers, and returns the path."""
        if not self._enabled:
            return None
        path = self.image_path(step, name)
        path.parent.mkdir(exist_ok=True)
        write_png(path, image)
        self._call("image", step, name, image)
        return path

    def image_path(self, step: int, name: str) -> pathlib.Path:
        return self._workdir / "pictures" / f"{name}_{step:06d}.png"

    def write_evaluation(self, step: int, evaluation: Evaluation) -> pathlib.Path | None:
        """Writes the scores and a picture of predictions; returns the path of the picture."""
        scores, positive = evaluation.scores, evaluation.positive_scores
        values: dict[str, float] = {
            "eval/miou": scores.miou,
            "eval/pixel_accuracy": scores.pixel_accuracy,
            "eval/mean_accuracy": scores.mean_accuracy,
            "eval/images": evaluation.num_images,
        }
        if positive:
            for name in ("precision", "recall", "f1"):
                values[f"eval/{name}"] = getattr(positive, name)
        for name, iou in zip(evaluation.labels.names, scores.per_class_iou, strict=True):
            values[f"eval/iou/{name}"] = float(iou)
        self.write_scalars(step, values)
        if not evaluation.predictions:
            return None
        picture = prediction_grid(evaluation.predictions, evaluation.labels)
        return self.write_image(step, PREDICTIONS, picture)

    def _call(self, method: str, *arguments: Any) -> None:
        for name, logger in list(self._loggers.items()):
            with self._drop_failing(name):
                getattr(logger, method)(*arguments)

    @contextlib.contextmanager
    def _drop_failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service's library raises while it is offline
            self._loggers.pop(name, None)
            reason = f"{type(error).__name__}: {first_line(error)}"
            print_warning(f"the logger {name!r} failed ({reason}); training goes on without it")

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._jsonl.close()
            self._call("close")


def drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps the lines up to a step, without a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(f"{line}\n")
    write_bytes(path, "".join(kept).encode())


class StepLog:
    """Collects the metrics of steps without blocking the device, and writes their means."""

    def __init__(
        self,
        config: TrainConfig,
        writer: MetricWriter,
        progress: Progress,
        flush_first: Callable[[], None],
    ) -> None:
        """Starts the clock; `flush` begins with `flush_first`, even if a loss is not finite."""
        self._config, self._writer, self._progress = config, writer, progress
        self._flush_first = flush_first
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts a new interval, so that time spent elsewhere does not count as training."""
        self._start, self._num_steps, self._waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time of its body as data wait, if the device is idle at its end."""
        begin = time.perf_counter()
        yield
        if all(metrics["loss"].is_ready() for _, metrics in self._pending[-1:]):
            self._waited += time.perf_counter() - begin

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds the metrics of a step; writes every `log_every` steps and at the first.

        Raises:
          UserError: a loss or gradient is not finite.
        """
        self._pending.append((step, metrics))
        self._num_steps += 1
        # One step runs while the next is prepared; more would only fill the memory with batches.
        jax.block_until_ready([metrics for _, metrics in self._pending[-2:-1]])
        if step % self._config.log_every == 0 or step == 1:
            self.flush()

    def flush(self) -> None:
        """Writes the pending metrics.

        Raises:
          UserError: a loss or gradient is not finite; the message names the step.
        """
        self._flush_first()
        if not self._pending:
            return
        fetched, self._pending = jax.device_get(self._pending), []
        for step, metrics in fetched:
            if not all(map(np.isfinite, metrics.values())):
                values = ", ".join(f"{name} {float(value):g}" for name, value in metrics.items())
                raise UserError(
                    f"step {step} is not finite: {values}. Nothing after the last good checkpoint "
                    "was saved. Lower config.optimizer.learning_rate, add "
                    "config.optimizer.warmup_steps or config.optimizer.clip_norm, and use another "
                    "--workdir."
                )
        elapsed = time.perf_counter() - self._start
        step, last = fetched[-1]
        means = {name: float(np.mean([metrics[name] for _, metrics in fetched])) for name in last}
        means |= {
            "learning_rate": float(last["learning_rate"]),
            "images_per_second": self._num_steps * self._config.batch_size / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self._writer.write_scalars(step, means)
        self._progress.step(step, means)
        self.restart_clock()
