"""A model in a checkpoint: arrays by name, and a JSON that says what the model is.

`model` and `info` of a run's checkpoint, or of a folder that `deeplab-jax convert` writes: nothing
else is needed to use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from deeplab_jax.data.labels import LabelSet
from deeplab_jax.models.architecture import BACKBONES, HEADS, Architecture
from deeplab_jax.models.functional import Variables
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.registry import module_of

METRIC = "miou"
FORMAT = 2  # of `info` and of the names of arrays; raised when their meaning changes


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
        with orbax_context():
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
    with ocp.training.Checkpointer(folder, context=orbax_context()) as checkpointer:
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
        with orbax_context():
            trees = ocp.load_checkpointables(folder, {"model": _host_tree(folder), "info": None})
            info = trees["info"]
            model = trees["model"]
    except Exception as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from error
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
        with orbax_context(), quiet():
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


def orbax_context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    # Without a name of its own a dictionary of numbers would be stored as arrays.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="info")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
