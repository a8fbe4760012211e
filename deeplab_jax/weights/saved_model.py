"""The model in a checkpoint: `model`, arrays by name, and `info`, a JSON that describes them.

Checkpoints of runs have both, and so do the folders that `deeplab-jax convert` writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from deeplab_jax.data.labels import LabelSet
from deeplab_jax.models.architecture import BACKBONES, HEADS, Architecture
from deeplab_jax.models.functional import Variables
from deeplab_jax.utils.errors import UserError, first_line
from deeplab_jax.utils.registry import module_of

METRIC = "miou"
FORMAT = 2  # of `info` and of the names of arrays; incremented when their meaning changes


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model that was read from a checkpoint or a weights file.

    Attributes:
      path: The checkpoint's folder or the file.
      info: See `describe`.
      read_variables: Reads `variables`; raises UserError.
    """

    path: pathlib.Path
    info: dict[str, Any]
    read_variables: Callable[[], Variables]

    @functools.cached_property
    def variables(self) -> Variables:
        """Arrays on the host, read at first use; the averaged parameters if the run kept them."""
        return self.read_variables()

    @property
    def architecture(self) -> Architecture:
        """The model's architecture.

        Raises:
          UserError: Its backbone or head is not registered. The message names the module that
            registers it.
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
                f"{' and '.join(modules)} registered it: import that first, or on the command line "
                f"give {' '.join(f'--import {module}' for module in modules)}"
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
    """Returns the `info` of a checkpoint: all that is needed to use the model.

    Args:
      architecture: The model's architecture.
      labels: Names and colours of the classes.
      mean: Mean of each channel, 0..1.
      std: Standard deviation of each channel, 0..1.
      resize: How images were resized in training, and the convention for coordinates.
      size: Height and width of the images or crops in training, pixels.
    """
    parts = {"backbone": BACKBONES[architecture.backbone], "head": HEADS[architecture.head]}
    modules = {part: module_of(entry) for part, entry in parts.items()}
    package = __name__.partition(".")[0]
    return {
        "format": FORMAT,
        "architecture": dataclasses.asdict(architecture),
        # The modules that register parts from outside this package, for an error message.
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
    """Writes a model as a checkpoint's folder, which appears only when it is complete.

    Raises:
      UserError: The path exists or cannot be written.
    """
    from orbax.checkpoint import v1 as ocp

    folder = pathlib.Path(path).absolute()
    if folder.exists():
        raise UserError(f"{path} exists already; choose another path, or remove it first")
    model = {"params": variables.params, "batch_stats": variables.batch_stats}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with orbax_context():
            ocp.save_checkpointables(folder, {"model": model, "info": info})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return folder


def find_checkpoint(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder of a checkpoint, given that folder, its parent or a workdir.

    Of several checkpoints it is the one with the highest mIoU, or the newest if none was evaluated.

    Raises:
      UserError: There is no checkpoint.
    """
    folder = pathlib.Path(path).absolute()
    if (folder / "info").is_dir() and (folder / "model").is_dir():
        return folder
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    steps = step_folders(folder)
    if not steps:
        raise UserError(
            f"no checkpoint at {path}: expected a workdir of train.py, its folder checkpoints/, "
            "one step's folder in it, or config.json with model.safetensors as on the hub"
        )
    # Without Orbax's `Checkpointer`, which waits for all processes of a run.
    evaluated = {step: miou for step in steps if (miou := _miou(step)) is not None}
    return max(evaluated, key=evaluated.__getitem__) if evaluated else steps[-1]


def _miou(folder: pathlib.Path) -> float | None:
    """Returns the mIoU in Orbax's file of a checkpoint's metrics, if there is one."""
    try:
        return float(json.loads((folder / "metrics" / "metrics").read_bytes())[METRIC])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def step_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints in a run's folder `checkpoints`, oldest first; none if it is absent.

    Orbax's unfinished folders have other names than a number.
    """
    if not folder.is_dir():
        return []
    steps = (child for child in folder.iterdir() if child.name.isdigit())
    return sorted(steps, key=lambda child: int(child.name))


def read(path: str | os.PathLike[str]) -> SavedModel:
    """Reads the model from a checkpoint; see `find_checkpoint` for the path.

    Raises:
      UserError: There is no checkpoint, or it cannot be read. So may the use of `variables`.
    """
    folder = find_checkpoint(path)
    jax.devices()  # so that a wrong JAX_PLATFORMS does not look like a damaged checkpoint
    info = _read_part(folder, "info")
    _require_format(folder, info)
    return SavedModel(folder, info, lambda: Variables(**_read_part(folder, "model")))


def _read_part(folder: pathlib.Path, name: str) -> Any:
    """Reads the checkpointable "info", or "model" as NumPy arrays, whatever devices wrote it."""
    from orbax.checkpoint import v1 as ocp

    try:
        with orbax_context():
            target = None
            if name == "model":
                metadata = ocp.checkpointables_metadata(folder).metadata[name]
                target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), metadata)
            return ocp.load_checkpointables(folder, {name: target})[name]
    except Exception as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from error


def check_format(workdir: pathlib.Path) -> None:
    """Raises UserError if the newest checkpoint in a workdir has another format.

    A checkpoint that cannot be read is ignored here, because `Checkpoints.restore` handles it.
    """
    newest = step_folders(workdir / "checkpoints")[-1]
    try:
        with quiet_orbax():
            info = _read_part(newest, "info")
    except UserError:
        return
    _require_format(newest, info)


def _require_format(path: pathlib.Path, info: dict[str, Any]) -> None:
    if info.get("format") != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {info.get('format')!r}, and this version of deeplab_jax "
            f"reads format {FORMAT}, because the names of parameters have changed. Use the version "
            "that wrote it. Its `deeplab-jax convert` writes a model of torchvision's family as "
            ".pth, which this version reads; train others again in another --workdir"
        )


def orbax_context(processes: Literal["alone", "together", "copies"] = "alone") -> Any:
    """Returns the `ocp.Context` with which all checkpoints are written and read.

    Args:
      processes: "alone": this process waits for no other. A `Checkpointer` needs all: "together" in
        one folder, to which each writes its own shards; or "copies", each with a folder of its own,
        of which that of process 0 gets the arrays.
    """
    from orbax.checkpoint import v1 as ocp  # takes 0.2 s, which weights files do not need

    registry = ocp.handlers.local_registry()
    # Without an explicit handler, a dictionary of numbers would be stored as arrays.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="info")
    context = ocp.Context()
    context.checkpointables.registry = registry
    if processes == "alone":
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    elif processes == "copies":
        context.multiprocessing.primary_host = None
        # Else a process takes the signal of another, that its folder exists, for its own.
        context.asynchronous.create_directories_asynchronously = False
    return context


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Mutes what Orbax's tasks log about a damaged file; the exception is still raised."""
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
