"""Receipts: what a run computed, as digests in `receipt.jsonl`, for `replay` and `bisect`.

The file has three kinds of lines. A start says with what a run started or resumed: versions,
config, data, devices. A step has a digest of each image with its label, and the bits of the
metrics. A state has a digest of each array, after that many steps. Numbers are hexadecimal.

Digests are sums of hashed words modulo 2^32, so that they depend neither on the order of the sums
nor on the devices. The devices compute them beside the training step, whose program stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Shaped, UInt8, UInt32

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config
from deeplab_jax.distributed import mesh as mesh_lib
from deeplab_jax.training.logging import drop_after
from deeplab_jax.training.provenance import Provenance
from deeplab_jax.training.state import TrainState
from deeplab_jax.training.step import Metrics
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import is_bucket, required_path

FILE = "receipt.jsonl"
FORMAT = 1  # of the file; incremented when the meaning of a digest changes
_DIGITS = 16  # of a digest
# Settings of JAX that decide which programs compute a step.
_OPTIONS = (
    *("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl"),
    "jax_threefry_partitionable",
)


def digest_rows(words: UInt32[Array, "n k"]) -> UInt32[Array, "n 2"]:
    """Returns two sums over each row: of its words, hashed with their positions, and weighted."""
    position = lax.broadcasted_iota(jnp.uint32, words.shape, 1)
    # The finalizer of MurmurHash3 (Appleby 2011), which maps words one to one.
    mixed = words ^ (position * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    mixed ^= mixed >> 16
    # One reduction of both, because two would keep `mixed` in memory, an array like `words`.
    sums = lax.reduce(
        (mixed, mixed * (2 * position + 1)),
        (jnp.uint32(0), jnp.uint32(0)),
        lambda one, other: (one[0] + other[0], one[1] + other[1]),
        dimensions=(1,),
    )
    return jnp.stack(sums, axis=-1)


def digest_images(
    image: UInt8[Array, "n h w c"], label: UInt8[Array, "n h w"]
) -> UInt32[Array, "n 2"]:
    """Returns a digest of each image with its label; four channels, the label first, are a word."""
    planes = [label, *jnp.unstack(image, axis=-1)]
    words = [
        sum(plane.astype(jnp.uint32) << 8 * i for i, plane in enumerate(planes[start : start + 4]))
        for start in range(0, len(planes), 4)
    ]
    return digest_rows(jnp.stack(words, axis=-1).reshape(len(label), -1))


def digest_array(array: Shaped[Array, " ..."]) -> UInt32[Array, " 2"]:
    """Returns a digest of the bits of an array."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    size = min(array.dtype.itemsize, 4)
    words = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    return digest_rows(words.reshape(1, -1))[0]


def named_arrays(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of a state, such as "params/backbone.conv1.kernel", in a fixed order."""
    parts = {
        "params": state.variables.params,
        "batch_stats": state.variables.batch_stats,
        "opt_state": state.opt_state,
        "ema_params": state.ema_params,
    }
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@functools.cache
def batch_digester(height: int, mesh: Mesh) -> Callable[[dict[str, Array]], UInt32[Array, "n 2"]]:
    """Returns the jitted function of a batch of `mesh.to_global`, whose images have this height."""

    def batch_digest(batch: dict[str, Array]) -> UInt32[Array, "n 2"]:
        batch = {name: mesh_lib.unpad_height(x, height, mesh) for name, x in batch.items()}
        return digest_images(batch["image"], batch["label"])

    return jax.jit(batch_digest, out_shardings=mesh_lib.replicated(mesh))


@functools.cache
def _array_digester(mesh: Mesh) -> Callable[[Array], UInt32[Array, " 2"]]:
    return jax.jit(digest_array, out_shardings=mesh_lib.replicated(mesh))


def digest_state(state: TrainState, mesh: Mesh) -> dict[str, UInt32[Array, " 2"]]:
    """Returns the digest of each array, without waiting for it, except on several CPU devices.

    A small program for each shape compiles in a tenth of the time of one program for all arrays.
    """
    digester = _array_digester(mesh)
    return {name: _alone(digester(array), mesh) for name, array in named_arrays(state).items()}


def _alone(digest: UInt32[Array, " ..."], mesh: Mesh) -> UInt32[Array, " ..."]:
    """Waits for a digest on several CPU devices.

    Programs with collectives that run there at once can wait for each other's threads without end;
    XLA aborts the process then.
    """
    is_waiting = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(digest) if is_waiting else digest


def spell(digests: Any) -> str:
    """Returns digests, or a float32, as hexadecimal digits."""
    words = np.asarray(digests)
    words = words.view(np.uint32) if words.dtype == np.float32 else words
    return words.astype(">u4").tobytes().hex()


def start_facts(
    config: Config,
    mesh: Mesh,
    inputs: dict[str, Any],
    origin: Provenance,
    num_examples: int,
    start_step: int,
) -> dict[str, Any]:
    """Returns the line that says with what a run starts.

    Args:
      config: the run.
      mesh: devices.
      inputs: see `workdir.collect_inputs`.
      origin: versions, and a digest of the first crop.
      num_examples: number of training examples of an epoch.
      start_step: steps that were taken before.
    """
    device = mesh.devices.flat[0]
    devices = {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").strip(),
    }
    if device.platform == "cpu":  # the number of threads decides how sums are divided
        devices["cores"] = len(os.sched_getaffinity(0))
    return {
        "receipt": FORMAT,
        "step": start_step,
        "versions": dict(origin.versions),
        "devices": devices | {name: jax.config.values.get(name) for name in _OPTIONS},
        "data": inputs
        | {"examples in an epoch": num_examples}
        | {"first crop": f"{origin.crop}, of {origin.image}"},
        "config": config_lib.flatten(config),
    }


class ReceiptWriter:
    """Writes a run's receipt without blocking the device; only process 0 writes.

    All processes must call the same methods, since their devices compute digests together.
    """

    def __init__(
        self, folder: pathlib.Path, config: Config, mesh: Mesh, start: dict[str, Any]
    ) -> None:
        """Drops the lines of an earlier attempt past the start; writes none before the first step.

        Args:
          folder: of the stage.
          config: the run; nothing is written if `train.receipt_every` is 0.
          mesh: devices.
          start: see `start_facts`.
        """
        self._path, self._start = folder / FILE, start
        is_done = start["step"] == config.train.steps  # a finished run that runs again
        self._every = 0 if is_done else config.train.receipt_every
        self._is_writer = jax.process_index() == 0
        self._mesh, self._height = mesh, config_lib.crop_shape(config.data)[0]
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._is_begun = False
        if self._is_writer:
            drop_after(self._path, start["step"])

    def digest_batch(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Returns the digests of the batch of a step that was not started yet, for `add_step`."""
        if not self._every:
            return {}
        digest = batch_digester(self._height, self._mesh)(batch)
        return {"batch": _alone(digest, self._mesh)}

    def add_step(self, step: int, digest: dict[str, Array], metrics: Metrics) -> None:
        """Adds the digests of the batch of a step, and its metrics."""
        if self._every:
            self._pending.append((step, digest | metrics))

    def add_state(self, step: int, state: TrainState, *, is_due: bool) -> None:
        """Adds the digests of the state after a step if they, or the checkpoint, are due."""
        is_start = step == self._start["step"]
        if self._every and (is_due or is_start or step % self._every == 0):
            self._pending.append((step, {"state": digest_state(state, self._mesh)}))

    def flush(self) -> None:
        """Waits for what was added, and writes it."""
        pending, self._pending = jax.device_get(self._pending), []
        if not pending or not self._is_writer:
            return
        lines = []
        for step, values in pending:
            if "state" in values and not self._is_begun:
                self._is_begun = True
                lines.append(self._start | {"arrays": list(values["state"])})
            values = {
                name: "".join(map(spell, value.values())) if name == "state" else spell(value)
                for name, value in values.items()
            }
            lines.append({"step": int(step)} | values)
        with self._path.open("a") as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in lines))


@dataclasses.dataclass(frozen=True)
class Receipt:
    """A receipt as it was read.

    Attributes:
      path: of the file.
      starts: the starts in order, see `start_facts`.
      steps: by step, digests and bits by name in the order in which they are computed.
      states: by step, the digest of each array.
      notes: what is wrong with the file.
    """

    path: pathlib.Path
    starts: list[dict[str, Any]]
    steps: dict[int, dict[str, str]]
    states: dict[int, dict[str, str]]
    notes: list[str]

    def start_of(self, step: int) -> dict[str, Any]:
        """Returns the start of the attempt that took a step."""
        before = [start for start in self.starts if start["step"] < step]
        return (before or self.starts[:1])[-1]

    @property
    def covered(self) -> str:
        """The steps that the receipt covers, as words."""
        if not self.steps:
            return "no steps"
        return f"steps {min(self.steps)} to {max(self.steps)}"


def split_digests(text: str) -> list[str]:
    """Returns the digests in a text of several."""
    return re.findall(f".{{{_DIGITS}}}", text)


def read(run: str | os.PathLike[str]) -> Receipt:
    """Reads the receipt of a run.

    Args:
      run: a workdir, of two stages the folder `stage1` in it for the first; or a receipt.

    Raises:
      UserError: there is no receipt, or it is damaged.
    """
    path = required_path(run, "the run")
    path = path if path.is_file() else path / FILE
    if not path.is_file():
        raise UserError(
            f"{run} holds no {FILE}: it is no run, or one of an earlier version, one with "
            "config.train.receipt_every=0, or one that was stopped before its first step"
        )
    result = Receipt(path, [], {}, {}, [])
    for line in _lines(path, result.notes):
        step = line.pop("step")
        if "receipt" in line:
            if line["receipt"] != FORMAT:
                raise UserError(
                    f"{path} has format {line['receipt']}, and this version of deeplab_jax reads "
                    f"format {FORMAT}: use the version that wrote it"
                )
            result.starts.append(line | {"step": step})
        elif "state" in line:
            digests = split_digests(line["state"])
            result.states[step] = dict(zip(result.starts[-1]["arrays"], digests, strict=True))
        else:
            result.steps[step] = line
    if not result.starts:
        raise UserError(f"{path} is empty: the run was stopped before its first step was written")
    return result


def _lines(path: pathlib.Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the lines; leaves out, with a note, a last one that a kill cut short."""
    lines, is_started = path.read_bytes().splitlines(), False
    arrays: list[str] = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            is_started |= "receipt" in line
            if not is_started or not isinstance(line["step"], int):
                raise ValueError("a receipt begins with the start of a run, and lines have a step")
            arrays = line.get("arrays", arrays)
            if "state" in line and len(line["state"]) != _DIGITS * len(arrays):
                raise ValueError("a state has one digest for each array of the start")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) > 1:
                notes.append(f"the last line of {path} is cut short, and is left out")
                return
            raise UserError(f"{path}, line {number}, is no line of a receipt: {error}") from error
        yield line


def local_run(run: str | os.PathLike[str], checkpoint: int | None = None) -> pathlib.Path:
    """Returns the folder of a run on this machine, after copying what is needed from a bucket.

    Args:
      run: a workdir or receipt, also in a bucket.
      checkpoint: the step of a checkpoint that is needed; None: only their names are.

    Raises:
      UserError: nothing is at the address, or it cannot be read.
    """
    if not is_bucket(run):
        return required_path(run, "the run")
    from deeplab_jax.buckets import staging

    part = r"\d+/info" if checkpoint is None else str(checkpoint)
    pattern = re.compile(rf"|[^/]*\.jsonl?|checkpoints/{part}/.*")
    return staging.stage(str(run), lambda name: bool(pattern.fullmatch(name)), title="its receipt")
