"""What a run says while it goes: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import pathlib

import jax
import rich.console
import rich.progress

from deeplab_jax.config import Config, TrainConfig, crop_shape
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.distributed.preemption import PreemptionHandler
from deeplab_jax.evaluation.confusion import Scores
from deeplab_jax.evaluation.evaluator import Evaluation, Evaluator
from deeplab_jax.models.functional import FunctionalModel, Variables


class Progress:
    """Writes to stderr, so that stdout holds results alone."""

    def __init__(self, train: TrainConfig, *, enabled: bool) -> None:
        self._steps = train.steps
        self._batch_size = train.batch_size
        self._enabled = enabled
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
        if self._enabled:
            self._console.print(text, markup=False)

    def describe(
        self,
        config: Config,
        model: FunctionalModel,
        train_set: Dataset,
        eval_set: Dataset,
        mesh: jax.sharding.Mesh,
        start: int,
    ) -> None:
        """What is about to run, in three lines."""
        arch = model.architecture
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model.abstract.params))
        height, width = crop_shape(config.data)
        device = mesh.devices.flat[0]
        self.message(
            f"{config.model.architecture}: {parameters:,} parameters, output stride "
            f"{arch.output_stride}, {arch.num_classes} classes, {arch.dtype}"
        )
        self.message(
            f"{config.data.name}: {len(train_set.source):,} images to train on "
            f"({config.data.split}), {len(eval_set.source):,} to evaluate on "
            f"({config.data.eval_split})"
        )
        self.message(
            f"{config.train.steps:,} steps of {config.train.batch_size} crops {height}x{width} on "
            f"{mesh.size} x {device.device_kind}" + (f", from step {start:,}" if start else "")
        )
        self._bar.update(self._task, completed=start)

    def step(self, step: int, values: dict[str, float]) -> None:
        """One logged step."""
        detail = (
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"{values['images_per_second']:.1f} images/s  "
            f"data wait {values['data_wait_share']:.0%}"
        )
        if self._live:
            self._bar.update(self._task, completed=step, detail=detail)
        else:
            self.message(f"step {step}/{self._steps}  {detail}{self._time_left(step, values)}")

    def _time_left(self, step: int, values: dict[str, float]) -> str:
        if step == 1:  # its time was spent compiling
            return ""
        seconds = (self._steps - step) * self._batch_size / values["images_per_second"]
        return f"  {datetime.timedelta(seconds=round(seconds))} left"

    def evaluate(
        self, evaluator: Evaluator, variables: Variables, step: int, stop: PreemptionHandler
    ) -> Evaluation | None:
        """Evaluates under a bar of its own."""
        task = self._bar.add_task("evaluate", total=evaluator.num_batches, detail=f"at step {step}")
        try:
            return evaluator.evaluate(
                variables,
                progress=lambda: self._bar.advance(task),
                should_stop=stop.should_stop,
            )
        finally:
            self._bar.remove_task(task)

    def evaluated(
        self,
        step: int,
        scores: Scores,
        images: int,
        absent: list[str],
        picture: pathlib.Path | None,
    ) -> None:
        """The scores of an evaluation."""
        without = f" (without {', '.join(absent)}: absent)" if absent else ""
        self.message(
            f"step {step}/{self._steps}  mIoU {scores.miou:.4f}{without}  "
            f"pixel accuracy {scores.pixel_accuracy:.4f}  on {images} images"
            + (f"  {_relative(picture)}" if picture else "")
        )


def _relative(path: pathlib.Path) -> str:
    here = pathlib.Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
