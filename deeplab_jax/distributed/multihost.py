"""What several processes must have in common, seen to before a run costs anything.

Each function is to be called by all processes, in the same order. With one process none of them
communicates or reads anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config
from deeplab_jax.data.dataset import Dataset
from deeplab_jax.utils.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_SOURCE = pathlib.Path(__file__).parents[1]
_EXAMPLES = 8  # of a split, from all over it: enough to tell data sets apart, read in no time
_SHOWN = 8  # differences in one message
_VISIBLE_SECONDS = 20.0  # until a shared file system shows on one host what another wrote
_NO_VALUE = "nothing"

Facts = dict[str, Any]


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def allgather(value: Any) -> list[Any]:
    """The values of all processes, by number; what JSON can write, and as it reads it again."""
    if jax.process_count() == 1:
        return [value]
    if len(jax.devices()) != jax.process_count() * jax.local_device_count():
        counts = [0] * jax.process_count()
        for device in jax.devices():
            counts[device.process_index] += 1
        raise UserError(f"the processes have different numbers of devices: {counts}")
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    # Few sizes, as a program is compiled for each.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def raise_on_all_hosts() -> Iterator[None]:
    """What fails within it on some processes ends all of them, and is said by all.

    Nothing within may wait for other processes: they may have failed.

    Raises:
      UserError: another process failed, or this one with a UserError.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if isinstance(failure, UserError):
        mistake: str | None = str(failure)
    else:
        mistake = None if failure is None else f"{type(failure).__name__}: {failure}"
    outcomes = allgather([host(), mistake])
    if failure is not None and not isinstance(failure, UserError):
        raise failure  # with its traceback
    failed = [(number, *outcome) for number, outcome in enumerate(outcomes) if outcome[1]]
    if len(failed) == len(outcomes) and len({said for _, _, said in failed}) == 1:
        raise UserError(failed[0][2])
    if failed:
        raise UserError(
            "\n".join(
                f"process {number} ({name}): {said}" for number, name, said in failed[:_SHOWN]
            )
        )


def check(config: Config, datasets: dict[str, Dataset]) -> None:
    """Refuses a run whose processes differ in config, code, versions or data.

    Args:
      config: of the run.
      datasets: its splits, by name.

    Raises:
      UserError: naming what differs, its values, and the processes and hosts that have them.
    """
    if jax.process_count() == 1:
        return
    with raise_on_all_hosts():
        ours = facts(config, datasets)
    everybody = allgather([host(), ours])
    message = disagreement([name for name, _ in everybody], [theirs for _, theirs in everybody])
    if message:
        raise UserError(message)


def facts(config: Config, datasets: dict[str, Dataset]) -> Facts:
    """What must be the same everywhere, in the order in which differences are told."""
    known: Facts = {f"config.{name}": value for name, value in config_lib.flatten(config).items()}
    known["version of python"] = platform.python_version()
    for package in PACKAGES:
        known[f"version of {package}"] = importlib.metadata.version(package)
    known["source files of deeplab_jax"] = source_digest()
    for split, dataset in datasets.items():
        known[f"classes of {split}"] = list(dataset.labels.names)
        known[f"number of images of {split}"] = len(dataset.source)
        known[f"images of {split} (digest of some)"] = data_digest(dataset)
    return known


def source_digest() -> str:
    """Of all source files of this package, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.rglob("*.py")):
        digest.update(str(path.relative_to(_SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def data_digest(dataset: Dataset) -> str:
    """Of the names, images and labels of a few examples from all over a data set."""
    digest = hashlib.sha256()
    size = len(dataset.source)
    for index in np.unique(np.linspace(0, size - 1, _EXAMPLES).astype(int)) if size else ():
        example = dataset.source[int(index)]
        digest.update(example["name"].encode() + b"\0")
        for array in (example["image"], example["label"]):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def disagreement(hosts: Sequence[str], everybody: Sequence[Facts]) -> str:
    """What processes differ in, by number, each on the host of its place; empty if in nothing."""
    names = list(dict.fromkeys(name for known in everybody for name in known))
    differing = []
    for name in names:
        holders: dict[str, list[int]] = {}
        for number, known in enumerate(everybody):
            value = json.dumps(known[name]) if name in known else _NO_VALUE
            holders.setdefault(value, []).append(number)
        if len(holders) > 1:
            values = [f"{value} on {_spell(who, hosts)}" for value, who in holders.items()]
            differing.append(f"  {name}: {'; '.join(values)}")
    if not differing:
        return ""
    more = [f"  and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
    return "\n".join(
        [
            "the processes do not agree, and one run needs all to have the same:",
            *differing[:_SHOWN],
            *more,
            "Start all of them with the same command, the same code and the same data.",
        ]
    )


def _spell(numbers: Sequence[int], hosts: Sequence[str]) -> str:
    if len(numbers) > 4:
        return f"{len(numbers)} processes, {numbers[0]} ({hosts[numbers[0]]}) the first"
    spelled = ", ".join(f"{number} ({hosts[number]})" for number in numbers)
    return f"process{'es' if len(numbers) > 1 else ''} {spelled}"


def check_shared(folder: pathlib.Path) -> None:
    """Refuses a workdir that is not one folder to all processes.

    Raises:
      UserError: some do not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    # A name that no earlier start left behind, and that all know.
    first_host, name = allgather([host(), f".shared-{secrets.token_hex(8)}"])[0]
    path = folder / name
    is_first = jax.process_index() == 0
    try:
        with raise_on_all_hosts():
            if is_first:
                path.touch()
        with raise_on_all_hosts():
            if not _appears(path):
                raise UserError(
                    f"--workdir {folder} is another folder here than on process 0 ({first_host}): "
                    "all processes need the same one, on a file system that all hosts share"
                )
    finally:
        if is_first:
            path.unlink(missing_ok=True)


def _appears(path: pathlib.Path) -> bool:
    """Whether a file comes into sight; a network's file system may take its time."""
    end = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
