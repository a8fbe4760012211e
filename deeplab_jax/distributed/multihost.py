"""Checks and exchanges between the processes of a run.

All processes must call these functions, in the same order. With one process they neither
communicate nor read anything.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from deeplab_jax import config as config_lib
from deeplab_jax.config import Config
from deeplab_jax.utils.errors import UserError
from deeplab_jax.utils.versions import byte_versions

_MAX_LISTED = 8  # differences in one message
_VISIBLE_SECONDS = 20.0  # for a file of one host to appear on the others of a shared file system

Facts = dict[str, Any]


def allgather(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, by process index."""
    if jax.process_count() == 1:
        return [value]
    if len(jax.devices()) != jax.process_count() * jax.local_device_count():
        counts = [0] * jax.process_count()
        for device in jax.devices():
            counts[device.process_index] += 1
        raise UserError(f"the processes have different numbers of devices: {counts}")
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    # Powers of two, because JAX compiles a program for each size.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def start_max(values: int | Sequence[int]) -> Int32[Array, ...]:
    """Starts to compute the largest of each value over all processes, without waiting for it."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "all"), PartitionSpec("all"))
    row = np.array(values, np.int32)[None]
    shape = (jax.device_count(), *row.shape[1:])
    return jnp.max(jax.make_array_from_callback(shape, sharding, lambda index: row), axis=0)


@contextlib.contextmanager
def raise_on_all_hosts() -> Iterator[None]:
    """Context manager that raises on all processes if its body fails on one of them.

    The body must not wait for other processes, which may have failed.

    Raises:
      UserError: another process failed, or this one with a UserError.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    message: str | None = None
    code = UserError.exit_code
    try:
        yield
    except UserError as error:
        message, code = str(error), error.exit_code
    except Exception as error:
        failure, message = error, f"{type(error).__name__}: {error}"
    outcomes = allgather([socket.gethostname(), message, code])
    if failure is not None:
        raise failure  # with its traceback
    failed = [(process, *outcome) for process, outcome in enumerate(outcomes) if outcome[1]]
    if not failed:
        return
    lines = [f"process {n} ({host}): {text}" for n, host, text, _ in failed[:_MAX_LISTED]]
    if len(failed) == len(outcomes) and len({text for _, _, text, _ in failed}) == 1:
        lines = [failed[0][2]]
    raised = UserError("\n".join(lines))
    raised.exit_code = max(code for *_, code in failed)
    raise raised


def check_equal(config: Config, inputs: Facts) -> None:
    """Checks that all processes have the same config, code, versions and data.

    Args:
      config: config of the run. The paths of its data may differ.
      inputs: what identifies the data.

    Raises:
      UserError: names each difference with its values, processes and hosts.
    """
    if jax.process_count() == 1:
        return
    facts: Facts = {
        f"config.{name}": value
        for name, value in config_lib.flatten(config).items()
        if name not in config_lib.DATA_PATHS
    }
    facts |= {f"version of {name}": version for name, version in byte_versions().items()}
    hosts, values = zip(*allgather([socket.gethostname(), facts | inputs]), strict=True)
    message = describe_differences(hosts, values)
    if message:
        raise UserError(message)


def describe_differences(hosts: Sequence[str], facts: Sequence[Facts]) -> str:
    """Returns an error message about facts that differ; empty if all are equal.

    Args:
      hosts: host name of each process.
      facts: facts of each process.
    """
    differences = []
    for name in dict.fromkeys(name for values in facts for name in values):
        processes: dict[str, list[int]] = {}  # by value
        for process, values in enumerate(facts):
            value = json.dumps(values[name]) if name in values else "nothing"
            processes.setdefault(value, []).append(process)
        if len(processes) > 1:
            parts = [f"{value} on {_spell(some, hosts)}" for value, some in processes.items()]
            differences.append(f"  {name}: {'; '.join(parts)}")
    if not differences:
        return ""
    if len(differences) > _MAX_LISTED:
        differences[_MAX_LISTED:] = [f"  and {len(differences) - _MAX_LISTED} more"]
    return "\n".join(
        [
            "the processes do not agree, and one run needs all to have the same:",
            *differences,
            "Start all of them with the same command, the same code and the same data.",
        ]
    )


def _spell(processes: Sequence[int], hosts: Sequence[str]) -> str:
    if len(processes) > 4:
        return f"{len(processes)} processes, {processes[0]} ({hosts[processes[0]]}) the first"
    names = ", ".join(f"{process} ({hosts[process]})" for process in processes)
    return f"process{'es' if len(processes) > 1 else ''} {names}"


def check_workdir(address: str, *, is_copied: bool) -> None:
    """Checks that all processes have the same workdir in a bucket, or all have a folder.

    Raises:
      UserError: lists what the processes have.
    """
    if jax.process_count() == 1:
        return
    hosts, found = zip(*allgather([socket.gethostname(), [address, is_copied]]), strict=True)
    if any(is_copied for _, is_copied in found) and len({name for name, _ in found}) > 1:
        raise UserError(describe_differences(hosts, [{"--workdir": name} for name, _ in found]))


def check_shared(folder: pathlib.Path) -> None:
    """Checks that a workdir is the same folder for all processes.

    Raises:
      UserError: a process does not see a file that process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    # A name that no earlier run can have left there, and that all processes know.
    first_host, name = allgather([socket.gethostname(), f".shared-{secrets.token_hex(8)}"])[0]
    path = folder / name
    is_first = jax.process_index() == 0
    try:
        with raise_on_all_hosts():
            if is_first:
                path.touch()
        with raise_on_all_hosts():
            deadline = time.monotonic() + _VISIBLE_SECONDS
            while not path.exists():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--workdir {folder} is another folder here than on process 0 "
                        f"({first_host}): all processes need the same one, on a file system that "
                        "all hosts share"
                    )
                time.sleep(0.2)
    finally:
        if is_first:
            path.unlink(missing_ok=True)
