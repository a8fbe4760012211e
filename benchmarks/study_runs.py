"""Runs the trainings and evaluations of the study as parallel processes, and resumes them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config
from deeplab_jax.config import io as config_io
from deeplab_jax.training.train import stage_configs
from deeplab_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "study.py"
_LAST_LINES = 5  # of the log of a failed run, shown in the error


@dataclasses.dataclass(frozen=True)
class Training:
    """The training of a row of configs/study.py with one seed.

    Attributes:
      name: of the row.
      settings: overrides of fields, as in `train.steps=10`.
      workdir: of the run.
    """

    name: str
    seed: int
    settings: tuple[str, ...]
    workdir: pathlib.Path

    def config(self) -> Config:
        config = config_io.from_python(f"{CONFIGS}:{self.name}")
        return config_io.override(config, [*self.settings, f"seed={self.seed}"])

    def last_stage(self) -> Config:
        """Returns the config of the last stage, whose run the workdir itself contains."""
        first, second = stage_configs(self.config(), self.workdir.absolute())
        return second or first

    def command(self) -> list[str]:
        overrides = [f"--config.{setting}" for setting in (*self.settings, f"seed={self.seed}")]
        config = f"--config={CONFIGS}:{self.name}"
        return [
            *[sys.executable, str(ROOT / "train.py"), config],
            *[f"--workdir={self.workdir}", *overrides],
        ]

    @property
    def log(self) -> pathlib.Path:
        return self.workdir / "log.txt"

    def checkpoint(self) -> pathlib.Path:
        return self.workdir / "checkpoints" / str(self.last_stage().train.steps)

    def miou(self) -> float | None:
        """Returns the mIoU at the last step, or None if the run has not reached it.

        Raises:
          UserError: the workdir contains a run of another config.
        """
        stored, metrics = self.workdir / "config.json", self.workdir / "metrics.jsonl"
        if not stored.exists() or not metrics.exists():
            return None
        config = self.last_stage()
        if different := config_lib.differences(config, json.loads(stored.read_text())):
            fields = "; ".join(f"{name}: {values}" for name, values in different.items())
            raise UserError(
                f"{self.workdir} contains a run of another config ({fields}); give another "
                "--workdir, or remove that folder"
            )
        for line in reversed(metrics.read_text().splitlines()):
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                entry = json.loads(line)
                if entry["step"] == config.train.steps and "eval/miou" in entry:
                    return float(entry["eval/miou"])
        return None


@dataclasses.dataclass(frozen=True)
class Scoring:
    """An evaluation of a training's last checkpoint with other settings than its config's."""

    name: str
    training: Training
    options: tuple[str, ...]

    @property
    def seed(self) -> int:
        return self.training.seed

    @property
    def file(self) -> pathlib.Path:
        return self.training.workdir / f"{self.name}.json"

    @property
    def log(self) -> pathlib.Path:
        return self.training.workdir / f"{self.name}.txt"

    def command(self) -> list[str]:
        checkpoint = str(self.training.checkpoint())
        return [
            *[sys.executable, "-m", "deeplab_jax.cli", "evaluate", checkpoint],
            *[*self.options, f"--json={self.file}"],
        ]

    def miou(self) -> float | None:
        return float(json.loads(self.file.read_text())["miou"]) if self.file.exists() else None


Run = Training | Scoring


def run_all(runs: Sequence[Run], jobs: int) -> None:
    """Executes the runs that are not finished, `jobs` at a time. Can be stopped and called again.

    Raises:
      UserError: a run failed; the others were stopped and have saved a checkpoint.
    """
    waiting = collections.deque(run for run in runs if run.miou() is None)
    core_sets = _split_cores(jobs)
    running: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
    with _progress(len(runs), len(runs) - len(waiting)) as done, _stopped_at_end(running):
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    run = waiting.popleft()
                    running[slot] = run, _start(run, core_sets[slot])
            time.sleep(0.2)
            for slot, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    _check(run, process.returncode)
                    done(run)


def _start(run: Run, cores: set[int]) -> subprocess.Popen[bytes]:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several runs may share a GPU
    }
    with run.log.open("ab") as log:
        # In its own session, so that it gets only one signal on Ctrl-C, from here. It saves on the
        # first signal, and a second one would stop it at once.
        process = subprocess.Popen(
            run.command(), stdout=log, stderr=log, env=environment, start_new_session=True
        )
    if cores:
        with contextlib.suppress(ProcessLookupError):  # it has already ended
            os.sched_setaffinity(process.pid, cores)
    return process


def _check(run: Run, code: int) -> None:
    if code or run.miou() is None:
        last = run.log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
        how = f"exit code {code}" if code else "it was stopped"
        raise UserError(f"{run.name}, seed {run.seed}: {how}; {run.log} ends:\n" + "\n".join(last))


def _split_cores(jobs: int) -> list[set[int]]:
    """Returns a set of cores for each parallel run; empty sets if the cores cannot be split."""
    if not hasattr(os, "sched_setaffinity"):  # only Linux has it
        return [set()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < jobs:
        return [set()] * jobs
    return [set(cores[slot::jobs]) for slot in range(jobs)]


@contextlib.contextmanager
def _stopped_at_end(running: dict[int, tuple[Run, subprocess.Popen[bytes]]]) -> Iterator[None]:
    """Stops the running processes at the end, so that they save checkpoints."""
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


@contextlib.contextmanager
def _progress(total: int, finished: int) -> Iterator[collections.abc.Callable[[Run], None]]:
    """Shows a progress bar in a terminal, and prints a line for each run that ends."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=total, completed=finished)

        def done(run: Run) -> None:
            bar.advance(task)
            count = int(bar.tasks[task].completed)
            console.print(
                f"{run.name}, seed {run.seed}: mIoU {100 * (run.miou() or 0):.1f} % "
                f"({count} of {total})"
            )

        yield done
