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
import operator
import os
import pathlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
from deeplab_jax.training.state import TrainState
from deeplab_jax.training.step import Metrics
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.paths import is_bucket, required_path

if TYPE_CHECKING:
    from deeplab_jax.training.train import Parts

FILE = "receipt.jsonl"
KINDS = ("config", "versions", "data", "devices")  # of facts of a start
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

    return _jit(batch_digest, mesh)


@functools.cache
def _array_digester(mesh: Mesh) -> Callable[[Array], UInt32[Array, " 2"]]:
    return _jit(digest_array, mesh)


def _jit(digest: Callable[[Any], Array], mesh: Mesh) -> Callable[[Any], Array]:
    """Jits a digest, which waits for its result only on several CPU devices.

    Programs with collectives that run there at once can wait for each other's threads without end;
    XLA aborts the process then.
    """
    jitted = jax.jit(digest, out_shardings=mesh_lib.replicated(mesh))
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return jitted
    return lambda argument: jax.block_until_ready(jitted(argument))


def digest_state(state: TrainState, mesh: Mesh) -> dict[str, UInt32[Array, " 2"]]:
    """Returns the digest of each array.

    A small program for each shape compiles in a tenth of the time of one program for all arrays.
    """
    digester = _array_digester(mesh)
    return {name: digester(array) for name, array in named_arrays(state).items()}


def spell(digests: Any) -> str:
    """Returns digests, or a float32, as hexadecimal digits."""
    words = np.asarray(digests)
    words = words.view(np.uint32) if words.dtype == np.float32 else words
    return words.astype(">u4").tobytes().hex()


def start_facts(parts: Parts, start_step: int) -> dict[str, Any]:
    """Returns the line that says with what a run starts after that many steps."""
    device, origin = parts.mesh.devices.flat[0], parts.origin
    devices = {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": parts.mesh.size,
        "processes": jax.process_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").strip(),
    }
    if device.platform == "cpu":  # the number of threads decides how sums are divided
        devices["cores"] = len(os.sched_getaffinity(0))
    return {
        "receipt": FORMAT,
        "step": start_step,
        "versions": origin.versions,
        "devices": devices | {name: jax.config.values.get(name) for name in _OPTIONS},
        "data": parts.inputs
        | {
            "examples in an epoch": len(parts.train_set.source),
            "first crop": f"{origin.crop}, of {origin.image}",
        },
        "config": config_lib.flatten(parts.config),
    }


class ReceiptWriter:
    """Writes a run's receipt without blocking the device; only process 0 writes.

    All processes must call the same methods, since their devices compute digests together.
    """

    def __init__(
        self, folder: pathlib.Path, config: Config, mesh: Mesh, start: dict[str, Any]
    ) -> None:
        """Drops the lines of an earlier attempt past `start`, see `start_facts`.

        Nothing is written if `train.receipt_every` is 0, or before the first step.
        """
        self._path, self._start = folder / FILE, start
        is_done = start["step"] == config.train.steps  # a finished run that runs again
        self._every = 0 if is_done else config.train.receipt_every
        self._mesh, self._height = mesh, config_lib.crop_shape(config.data)[0]
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._is_begun = False
        if jax.process_index() == 0:
            drop_after(self._path, start["step"])

    def digest_batch(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Returns the digests of a batch for `add_step`; its step must not have started."""
        return {"batch": batch_digester(self._height, self._mesh)(batch)} if self._every else {}

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
        if not pending or jax.process_index() > 0:
            return
        lines = []
        for step, values in pending:
            if "state" in values and not self._is_begun:
                self._is_begun = True
                lines.append(self._start | {"arrays": list(values["state"])})
            lines.append(line_of(step, values))
        with self._path.open("a") as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in lines))


def line_of(step: int, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the line of a step: digests of its batch, and its metrics; or of its "state"."""
    spelled = {
        name: "".join(map(spell, value.values())) if name == "state" else spell(value)
        for name, value in values.items()
    }
    return {"step": step} | spelled


@dataclasses.dataclass(frozen=True)
class Receipt:
    """A receipt as it was read."""

    path: pathlib.Path
    starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # see `start_facts`
    # By step, what it computed: "batch", the digest of each row; the bits of each metric by name;
    # and "state", the digest of each array by name.
    steps: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)  # what is wrong with the file

    def start_of(self, step: int) -> dict[str, Any]:
        """Returns the start of the attempt that took a step."""
        before = [start for start in self.starts if start["step"] < step]
        return (before or self.starts[:1])[-1]

    def steps_with(self, name: str) -> list[int]:
        """Returns the steps that have a "batch" or a "state", in order."""
        return sorted(step for step, values in self.steps.items() if name in values)

    @property
    def covered(self) -> str:
        """The steps that the receipt covers, as words."""
        steps = self.steps_with("batch")
        return f"steps {steps[0]} to {steps[-1]}" if steps else "no steps"

    def add(self, line: dict[str, Any]) -> None:
        """Adds a parsed line.

        Raises:
          ValueError, TypeError, KeyError: it is no line of a receipt.
        """
        step = operator.index(line.pop("step"))
        if "receipt" in line:
            if line["receipt"] != FORMAT:
                raise ValueError(
                    f"it has format {line['receipt']}, and this version of deeplab_jax reads "
                    f"format {FORMAT}: use the version that wrote it"
                )
            sizes = line["config"]["train.batch_size"], line["data"]["examples in an epoch"]
            facts = all(isinstance(line[kind], dict) for kind in KINDS)
            if not facts or min(*sizes, line["config"]["seed"] + 1) < 1:
                raise ValueError(f"a start has facts of {', '.join(KINDS)}")
            self.starts.append(line | {"step": step})
            return
        if not self.starts:
            raise ValueError("a receipt begins with the start of a run")
        values: dict[str, Any] = {}
        for name, text in line.items():
            int(text, 16)
            size = _DIGITS if name in ("batch", "state") else 8
            parts = [text[i : i + size] for i in range(0, len(text), size)]
            keys = self.starts[-1]["arrays"] if name == "state" else range(len(parts))
            if len(text) % size or len(parts) != len(keys):
                raise ValueError(f"{name} has {len(text)} digits, for {len(keys)} values of {size}")
            values[name] = text if size == 8 else dict(zip(keys, parts, strict=True))
        if "state" not in values and not {"batch", "loss"} <= values.keys():
            raise ValueError("a step has a batch and a loss")
        self.steps.setdefault(step, {}).update(values)


def read(run: str | os.PathLike[str]) -> Receipt:
    """Reads a receipt, or that of a workdir. A last line that is cut short becomes a note.

    Raises:
      UserError: there is no receipt, or it is damaged.
    """
    path = required_path(run, "the run")
    path = path if path.is_file() else path / FILE
    if not path.is_file():
        raise UserError(
            f"{run} holds no {FILE}: a run writes it from its first step on, unless "
            "config.train.receipt_every is 0"
        )
    receipt, lines = Receipt(path), path.read_bytes().splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            receipt.add(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number != len(lines) or number == 1:
                message = f"{path}, line {number}, is no line of a receipt: {error}"
                raise UserError(message) from error
            receipt.notes.append(f"the last line of {path} is cut short, and is left out")
    if not receipt.starts:
        raise UserError(f"{path} is empty: the run was stopped before its first step was written")
    return receipt


def local_run(run: str | os.PathLike[str], checkpoint: int | None = None) -> pathlib.Path:
    """Returns a workdir or receipt on this machine, after copying what is needed from a bucket.

    Of the checkpoints this is one, or else their names.

    Raises:
      UserError: nothing is at the address, or it cannot be read.
    """
    if not is_bucket(run):
        return required_path(run, "the run")
    from deeplab_jax.buckets import staging

    part = r"\d+/info" if checkpoint is None else str(checkpoint)
    pattern = re.compile(rf"|[^/]*\.jsonl?|checkpoints/{part}/.*")
    return staging.stage(str(run), lambda name: bool(pattern.fullmatch(name)), title="its receipt")
