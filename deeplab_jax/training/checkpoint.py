"""Checkpoints of a run: the only part that knows Orbax.

`<workdir>/checkpoints/<step>/` holds three things: `model` (parameters and running statistics by
name), `training` (what else a run needs to go on) and `info` (a JSON that says what the model is,
so that nothing else is needed to use it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from deeplab_jax.errors import UserError
from deeplab_jax.labels import LabelSet
from deeplab_jax.models.architecture import BACKBONES, HEADS, Architecture
from deeplab_jax.models.functional import Variables
from deeplab_jax.parallel import agreement
from deeplab_jax.registry import module_of
from deeplab_jax.training.state import TrainState

METRIC = "miou"
FORMAT = 2  # of `info` and of the names of arrays; raised when their meaning changes


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
            context=_context(),
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
                with _quiet():
                    trees = self._checkpointer.load_checkpointables(
                        found.step, _to_trees(abstract) | {"info": None}
                    )
            except Exception as error:  # whatever a damaged file makes the reader raise
                damage = _first_line(error)
            damage = next(filter(None, agreement.gather(damage)), "")
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
        with agreement.together():
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
            with agreement.together():
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
                raise self._disk_full(_first_line(error)) from error
            raise

    def _disk_full(self, detail: str) -> UserError:
        return UserError(
            f"the disk that holds {self._directory} is full ({detail}); earlier checkpoints are "
            "whole. Make room and run the same command again: it goes on from the newest."
        )


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What a checkpoint holds of a model, on the host."""

    path: pathlib.Path
    variables: Variables  # the averaged parameters where the run kept them
    info: dict[str, Any]

    @property
    def architecture(self) -> Architecture:
        """What the model is made of.

        Raises:
          UserError: its backbone or head is not registered here; names the module that did it.
        """
        fields = self.info["architecture"]
        absent = [
            (f"{part} {fields[part]!r}", self.info["registered_by"].get(part, "MODULE"))
            for part, registry in (("backbone", BACKBONES), ("head", HEADS))
            if fields[part] not in registry
        ]
        if absent:
            parts = " and the ".join(part for part, _ in absent)
            modules = dict.fromkeys(module for _, module in absent)
            raise UserError(
                f"{self.path} has the {parts}, not registered here. When the model was trained, "
                f"{' and '.join(modules)} did it: import that first, or on the command line give "
                + " ".join(f"--import {module}" for module in modules)
            )
        return Architecture(**fields)


def describe(
    architecture: Architecture,
    labels: LabelSet,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    resize: str,
    size: Sequence[int],
) -> dict[str, Any]:
    """What a checkpoint says of its model; with it nothing else is needed to use it.

    Args:
      architecture: of the model.
      labels: names and colours of its classes.
      mean: of the channels, 0..1.
      std: of the channels, 0..1.
      resize: how images were resized in training and at which convention of coordinates.
      size: height and width of the images or crops that it was trained on, pixels.
    """
    parts = {"backbone": BACKBONES[architecture.backbone], "head": HEADS[architecture.head]}
    modules = {part: module_of(entry) for part, entry in parts.items()}
    package = __name__.partition(".")[0]
    return {
        "format": FORMAT,
        "architecture": dataclasses.asdict(architecture),
        # Where the parts that are not this package's were registered, for an error to name.
        "registered_by": {
            part: module for part, module in modules.items() if module.partition(".")[0] != package
        },
        "classes": list(labels.names),
        "palette": [list(color) for color in labels.colors],
        "mean": list(mean),
        "std": list(std),
        "resize": resize,
        "input_size": list(size),
    }


def write_model(
    path: str | os.PathLike[str], variables: Variables, info: dict[str, Any]
) -> pathlib.Path:
    """Writes a model alone as a checkpoint's folder, which `read` takes; whole or not at all.

    Raises:
      UserError: if there is something at the path, or it cannot be written.
    """
    folder = pathlib.Path(path).absolute()
    if folder.exists():
        raise UserError(f"{path} exists already; choose another place, or remove it first")
    model = {"params": variables.params, "batch_stats": variables.batch_stats}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _context():
            ocp.save_checkpointables(folder, {"model": model, "info": info})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return folder


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of one checkpoint, of a path that is it, its parent, or a workdir.

    Where there are several: the best by mIoU, or the newest if none was evaluated.

    Raises:
      UserError: if there is no checkpoint.
    """
    folder = pathlib.Path(path).absolute()
    if (folder / "info").is_dir() and (folder / "model").is_dir():
        return folder
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not folder.is_dir() or not any(child.name.isdigit() for child in folder.iterdir()):
        raise UserError(
            f"no checkpoint at {path}: expected a workdir of train.py, its folder checkpoints/, or "
            "one step's folder in it"
        )
    with ocp.training.Checkpointer(folder, context=_context()) as checkpointer:
        found = checkpointer.checkpoints
    if not found:
        raise UserError(f"no whole checkpoint at {path}")
    evaluated = [one for one in found if one.metrics]
    best = max(evaluated, key=lambda one: one.metrics[METRIC]) if evaluated else found[-1]
    return folder / str(best.step)


def read(path: str | os.PathLike[str]) -> SavedModel:
    """Reads a model from a checkpoint, see `find`.

    Raises:
      UserError: if there is none or it cannot be read.
    """
    folder = find(path)
    try:
        with _context():
            trees = ocp.load_checkpointables(folder, {"model": _host_tree(folder), "info": None})
            info = trees["info"]
            model = trees["model"]
    except Exception as error:
        raise UserError(f"{folder} cannot be read: {_first_line(error)}") from error
    _require_format(folder, info)
    return SavedModel(folder, Variables(model["params"], model["batch_stats"]), info)


def check_format(workdir: pathlib.Path) -> None:
    """Sees that this version can go on with the run in a workdir.

    Raises:
      UserError: its newest checkpoint has another format. One that cannot be read is no matter
        here: `Checkpoints.restore` deals with damage.
    """
    folder = workdir / "checkpoints"
    steps = [child for child in folder.iterdir() if child.name.isdigit()]
    newest = max(steps, key=lambda child: int(child.name))
    try:
        with _context(), _quiet():
            info = ocp.load_checkpointables(newest, {"info": None})["info"]
    except Exception:  # whatever a damaged file makes the reader raise
        return
    _require_format(newest, info)


def _require_format(path: pathlib.Path, info: dict[str, Any]) -> None:
    if info.get("format") != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {info.get('format')!r}, and this version of deeplab_jax "
            f"reads format {FORMAT}, since the names of parameters have changed. Use the version "
            "that wrote it. There `deeplab-jax convert` writes a model of torchvision's family as "
            ".pth, which this version reads; train others again in another --workdir"
        )


def _host_tree(folder: pathlib.Path) -> Any:
    """The abstract model of a checkpoint, to be read into NumPy arrays on any devices."""
    metadata = ocp.checkpointables_metadata(folder).metadata["model"]
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), metadata)


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    # Without a name of its own a dictionary of numbers would be stored as arrays.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="info")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes what the reader's tasks print of a damaged file; its exception still comes."""
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
