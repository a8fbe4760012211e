"""Checkpoints of a run.

`<workdir>/checkpoints/<step>/` contains three items: `model` (parameters and running statistics by
name), `training` (the rest of the state, needed to resume) and `info` (a JSON that describes the
model, so that the checkpoint can be used without a config). `weights.saved_model` reads `model` and
`info`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from deeplab_jax.distributed import multihost
from deeplab_jax.models.functional import Variables
from deeplab_jax.training.state import TrainState
from deeplab_jax.utils.errors import UserError, first_line
from deeplab_jax.weights.saved_model import METRIC, orbax_context, quiet_orbax


class Restored(NamedTuple):
    """The state of a run after `step` steps, its mIoU if it was evaluated, and the saved `info`."""

    state: TrainState
    step: int
    miou: float | None
    info: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the newest few, and the best by mIoU.

    Saves are asynchronous and get their final name only when complete. All processes must call each
    method. Together they write into one folder, each its own shards; or each has a folder of its
    own, and that of process 0 gets the arrays of all.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep: int,
        log: Callable[[str], None],
        is_copied: bool = False,
    ) -> None:
        """Opens the folder, and creates it if absent.

        Args:
          directory: the folder; with `is_copied` each process has its own.
          keep: number of the newest checkpoints to keep, besides the best.
          log: prints a line.
        """
        self._directory, self._log = directory, log
        self._is_copied = is_copied and jax.process_count() > 1
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[METRIC],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._open = functools.partial(
            ocp.training.Checkpointer,
            directory,
            context=orbax_context("copies" if self._is_copied else "together"),
            # The training loop decides when to save: it forces each save.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )
        self._checkpointer = self._open()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first; the newest may be damaged."""
        return [found.step for found in self._checkpointer.checkpoints]

    def restore(self, abstract: TrainState) -> Restored | None:
        """Returns the newest intact checkpoint, or None if there are no checkpoints.

        Moves checkpoints that cannot be read to `broken/` beside the checkpoints, with a message.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        broken: dict[int, str] = {}  # what is wrong, by step
        for found in reversed(self._checkpointer.checkpoints):
            damage = ""
            try:
                # Alone, because not all processes may find it damaged.
                with quiet_orbax(), orbax_context():
                    trees = ocp.load_checkpointables(
                        self._directory / str(found.step), _to_trees(abstract) | {"info": None}
                    )
            except Exception as error:  # a damaged file can make the reader raise anything
                damage = first_line(error)
            damage = next(filter(None, multihost.allgather(damage)), "")
            if damage:
                broken[found.step] = damage
                continue
            if broken:
                self._set_aside(broken)
            miou = (found.metrics or {}).get(METRIC)
            return Restored(_from_trees(trees, abstract), found.step, miou, trees["info"])
        if broken:
            steps = "\n".join(f"  step {step}: {reason}" for step, reason in broken.items())
            raise UserError(
                f"no checkpoint under {self._directory} can be read:\n{steps}\n"
                "Choose another --workdir, or remove this folder to start from the beginning."
            )
        return None

    def _set_aside(self, broken: dict[int, str]) -> None:
        self._checkpointer.close()
        is_writer = self._is_copied or jax.process_index() == 0  # of this folder
        with multihost.raise_on_all_hosts():
            for step, reason in broken.items() if is_writer else ():
                target = self._directory.parent / "broken" / str(step)
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(self._directory / str(step), target)
                self._log(f"checkpoint {step} cannot be read ({reason}); moved to {target}")
        self._checkpointer = self._open()

    def save(
        self, state: TrainState, step: int, info: dict[str, Any], miou: float | None, *, wait: bool
    ) -> None:
        """Starts to save, unless this step is saved already; returns once the arrays are copied.

        The buffers of the state may be donated then. With `wait`, everything is written.

        Raises:
          UserError: the disk is full, in this save or the last one. Earlier checkpoints are kept.
        """
        with self._explain_full_disk():
            if step not in self.steps:
                with multihost.raise_on_all_hosts():
                    if not self._is_copied or jax.process_index() == 0:
                        self._check_space(state)
                if self._is_copied:
                    state = multihost_utils.process_allgather(state, tiled=True)
                trees = _to_trees(state) | {"info": info}
                # An evaluation without valid pixels has no mIoU to compare with that of others.
                metrics = None if miou is None or math.isnan(miou) else {METRIC: miou}
                self._checkpointer.save_checkpointables_async(
                    step, trees, force=True, metrics=metrics
                )
            if wait:
                self._checkpointer.wait()

    def close(self) -> None:
        """Waits until the last save is written; raises as `save`."""
        with self._explain_full_disk():
            self._checkpointer.close()

    def _check_space(self, state: TrainState) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise self._disk_full(f"{free / 1e6:.0f} MB free, about {needed / 1e6:.0f} MB needed")

    @contextlib.contextmanager
    def _explain_full_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            # TensorStore reports the system's error only as text in its message.
            if full or "No space left" in str(error) or "ENOSPC" in str(error):
                raise self._disk_full(first_line(error)) from error
            raise

    def _disk_full(self, detail: str) -> UserError:
        return UserError(
            f"the disk that holds {self._directory} is full ({detail}); earlier checkpoints are "
            "intact. Free some space and run the same command again: it resumes from the newest."
        )


def read_state(folder: pathlib.Path, abstract: TrainState) -> TrainState:
    """Reads the state of the checkpoint in a folder, without a change to it.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    try:
        with quiet_orbax(), orbax_context():
            trees = ocp.load_checkpointables(folder, _to_trees(abstract))
    except Exception as error:  # a damaged file can make the reader raise anything
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from error
    return _from_trees(trees, abstract)


def _to_trees(state: TrainState) -> dict[str, Any]:
    variables = state.eval_variables
    training = {"step": state.step, "opt_state": _by_path(state.opt_state)}
    if state.ema_params is not None:
        training["raw_params"] = state.variables.params
    return {
        "model": {"params": variables.params, "batch_stats": variables.batch_stats},
        "training": training,
    }


def _from_trees(trees: dict[str, Any], abstract: TrainState) -> TrainState:
    model, training = trees["model"], trees["training"]
    averaged = abstract.ema_params is not None
    params = training["raw_params"] if averaged else model["params"]
    leaves = [training["opt_state"][path] for path in _by_path(abstract.opt_state)]
    return TrainState(
        step=training["step"],
        variables=Variables(params, model["batch_stats"]),
        opt_state=jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves),
        ema_params=model["params"] if averaged else None,
    )


def _by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves by key path, so that the files do not depend on optax's types."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
