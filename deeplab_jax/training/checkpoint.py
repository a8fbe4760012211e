"""Checkpoints of a run.

`<workdir>/checkpoints/<step>/` holds three things: `model` (parameters and running statistics by
name), `training` (what else a run needs to go on) and `info` (a JSON that says what the model is,
so that nothing else is needed to use it). `weights.saved_model` has what `model` and `info` hold.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from deeplab_jax.distributed import multihost
from deeplab_jax.models.functional import Variables
from deeplab_jax.training.state import TrainState
from deeplab_jax.utils.errors import UserError
from deeplab_jax.weights.saved_model import METRIC, first_line, orbax_context, quiet


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run as it stood after `step` steps."""

    state: TrainState
    step: int
    miou: float | None  # of the evaluation at this step, if there was one


class Checkpoints:
    """The checkpoints of one run: the newest few, and the best by mIoU.

    Saves are asynchronous and appear under their final name only when whole. Several processes
    write into one folder, each what its devices hold of an array first; all call each method.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int, log: Callable[[str], None]) -> None:
        self._directory = directory
        self._keep = keep
        self._log = log
        self._open()

    def _open(self) -> None:
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            context=orbax_context(),
            # The loop alone decides when to save: each of its saves is forced.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(self._keep),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[METRIC],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest whole checkpoint, or None if there is none at all.

        One that cannot be read is moved to `broken/` beside the checkpoints, and said.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Raises:
          UserError: if there are checkpoints and none can be read.
        """
        broken = []
        for found in reversed(self._checkpointer.checkpoints):
            damage = ""
            try:
                with quiet():
                    trees = self._checkpointer.load_checkpointables(
                        found.step, _to_trees(abstract) | {"info": None}
                    )
            except Exception as error:  # whatever a damaged file makes the reader raise
                damage = first_line(error)
            damage = next(filter(None, multihost.allgather(damage)), "")
            if damage:
                broken.append((found.step, damage))
                continue
            if broken:
                self._set_aside(broken)
            state = _from_trees(trees, abstract)
            return Restored(state, found.step, (found.metrics or {}).get(METRIC))
        if broken:
            steps = "\n".join(f"  step {step}: {reason}" for step, reason in broken)
            raise UserError(
                f"no checkpoint under {self._directory} can be read:\n{steps}\n"
                "Choose another --workdir, or remove this folder to start anew."
            )
        return None

    def _set_aside(self, broken: list[tuple[int, str]]) -> None:
        self._checkpointer.close()
        with multihost.raise_on_all_hosts():
            for step, reason in broken if jax.process_index() == 0 else ():
                target = self._directory.parent / "broken" / str(step)
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(self._directory / str(step), target)
                self._log(f"checkpoint {step} cannot be read ({reason}); moved to {target}")
        self._open()

    def save(
        self, state: TrainState, step: int, info: dict[str, Any], miou: float | None, *, wait: bool
    ) -> None:
        """Saves unless this step is saved already; returns once the arrays are copied.

        Args:
          state: to save; its buffers may be donated afterwards.
          step: steps made, as the state says.
          info: what the model is.
          miou: of this state, if it was evaluated.
          wait: return only when everything is written.

        Raises:
          UserError: if the disk is full. Earlier checkpoints stay as they are.
        """
        if step not in [found.step for found in self._checkpointer.checkpoints]:
            with multihost.raise_on_all_hosts():
                self._check_space(state)
            trees = _to_trees(state) | {"info": info}
            # Without a valid pixel there is no mIoU, and none is better or worse than a number.
            metrics = None if miou is None or math.isnan(miou) else {METRIC: miou}
            self._guard(
                lambda: self._checkpointer.save_checkpointables_async(
                    step, trees, force=True, metrics=metrics
                )
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is written."""
        self._guard(self._checkpointer.close)
        self._open()

    def close(self) -> None:
        self._guard(self._checkpointer.close)

    def _check_space(self, state: TrainState) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise self._disk_full(f"{free / 1e6:.0f} MB free, about {needed / 1e6:.0f} MB needed")

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            # TensorStore reports the system's error in its message alone.
            if full or "No space left" in str(error) or "ENOSPC" in str(error):
                raise self._disk_full(first_line(error)) from error
            raise

    def _disk_full(self, detail: str) -> UserError:
        return UserError(
            f"the disk that holds {self._directory} is full ({detail}); earlier checkpoints are "
            "whole. Make room and run the same command again: it goes on from the newest."
        )


def _to_trees(state: TrainState) -> dict[str, Any]:
    variables = state.eval_variables
    training: dict[str, Any] = {
        "step": state.step,
        # By key path, so that what is stored does not hang on optax's own types.
        "opt_state": {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        },
    }
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
    keys = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(abstract.opt_state)
    ]
    return TrainState(
        step=training["step"],
        variables=Variables(params, model["batch_stats"]),
        opt_state=jax.tree.unflatten(
            jax.tree.structure(abstract.opt_state), [training["opt_state"][key] for key in keys]
        ),
        ema_params=model["params"] if averaged else None,
    )
