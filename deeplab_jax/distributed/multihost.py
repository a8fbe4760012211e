"""Checks and exchanges between the processes of a run.

All processes must call these functions, in the same order. With one process they neither
communicate nor read anything.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
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

from deeplab_jax.utils.errors import MAX_LISTED_PROBLEMS, UserError, listed, raise_problems

_VISIBLE_SECONDS = 20.0  # for a file of one host to appear on the others of a shared file system

Facts = dict[str, Any]


def allgather(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, by process index."""
    if jax.process_count() == 1:
        return [value]
    if len(jax.devices()) != jax.process_count() * jax.local_device_count():
        found = collections.Counter(device.process_index for device in jax.devices())
        counts = [found[process] for process in range(jax.process_count())]
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
    outcome = None
    try:
        yield
    except UserError as error:
        outcome = str(error), error.exit_code
    except Exception as error:
        failure, outcome = error, (f"{type(error).__name__}: {error}", UserError.exit_code)
    outcomes = allgather([socket.gethostname(), outcome])
    if failure is not None:
        raise failure  # with its traceback
    failed = [(n, host, *outcome) for n, (host, outcome) in enumerate(outcomes) if outcome]
    if not failed:
        return
    lines = [f"process {n} ({host}): {text}" for n, host, text, _ in failed]
    if len(failed) == len(outcomes) and len({text for _, _, text, _ in failed}) == 1:
        lines = [failed[0][2]]
    raised = UserError("\n".join(lines[:MAX_LISTED_PROBLEMS]))
    raised.exit_code = max(code for *_, code in failed)
    raise raised


def check_equal(facts: Facts) -> None:
    """Checks that all processes have the same facts: JSON values by name.

    Raises:
      UserError: names each difference with its values, processes and hosts.
    """
    if jax.process_count() > 1:
        compare_facts(*zip(*allgather([socket.gethostname(), facts]), strict=True))


def compare_facts(hosts: Sequence[str], facts: Sequence[Facts]) -> None:
    """Raises the error of `check_equal` if the facts of the processes on these hosts differ."""
    differences = []
    for name in dict.fromkeys(itertools.chain(*facts)):
        processes: dict[str, list[str]] = {}  # by value
        for number, (host, values) in enumerate(zip(hosts, facts, strict=True)):
            value = json.dumps(values[name]) if name in values else "nothing"
            processes.setdefault(value, []).append(f"{number} ({host})")
        if len(processes) > 1:
            parts = [f"{value} on process {listed(some)}" for value, some in processes.items()]
            differences.append(f"{name}: {'; '.join(parts)}")
    headline = "the processes do not agree: start all with the same command, code and data"
    raise_problems(headline, differences)


def check_shared(folder: pathlib.Path) -> None:
    """Checks that a workdir is the same folder for all processes.

    Raises:
      UserError: a process does not see a file that process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    # A name that no earlier run can have left there, and that all processes know.
    first_host, name = allgather([socket.gethostname(), f".shared-{secrets.token_hex(8)}"])[0]
    path, is_first = folder / name, jax.process_index() == 0
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
