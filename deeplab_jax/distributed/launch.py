"""Starts a run on several processes, and ends all of them when one fails.

`jax.distributed.initialize` finds the processes of a Cloud TPU, of SLURM and of Open MPI, and
connects them to a service on process 0. This module adds time limits to every wait, and messages
that say what went wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
from orbax.checkpoint import multihost as orbax_multihost

from deeplab_jax.distributed import multihost
from deeplab_jax.utils.errors import UserError, first_line

_PERIOD = 2.0  # seconds between the watchdog's barriers
_JAX_MARGIN = 40  # seconds by which JAX's own timeouts, which abort, come later than ours
_WATCHDOG_MARGIN = 10.0  # seconds after `lost_timeout` by which a watchdog has ended its process
_FAREWELL = 3.0  # seconds for processes that fail in the same way to meet
_NO_CLUSTER = "coordinator_address should be defined"  # jax.distributed's error outside a cluster

# Environment variables of launchers that JAX supports: number of processes, index of this process,
# and others that JAX needs.
_LAUNCHERS = {
    "SLURM": (
        *("SLURM_NTASKS", "SLURM_PROCID"),
        *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"),
    ),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
}


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """How a process finds the others; what is None, JAX finds in a cluster.

    Attributes:
      coordinator: "host:port" of process 0.
      num_processes: number of processes; 1: ignore a cluster.
      process_id: index of this process, from 0.
      start_timeout: seconds within which all processes must start.
      lost_timeout: seconds without an answer after which a process counts as lost.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout: int = 300
    lost_timeout: int = 60

    def __post_init__(self) -> None:
        """Raises UserError for options that are incomplete or out of range."""
        count, index, address = self.num_processes, self.process_id, self.address
        if count is not None and count < 1:
            raise UserError(f"--num_processes must be 1 or more, got {count}")
        if min(self.start_timeout, self.lost_timeout) < 1:
            raise UserError("--start_timeout and --lost_timeout must be 1 second or more")
        if count == 1 or (self.coordinator, count, index) == (None, None, None):
            return
        if address is None or count is None or index is None:
            given = {"--coordinator": address, "--num_processes": count, "--process_id": index}
            missing = " and ".join(name for name, value in given.items() if value is None)
            raise UserError(
                f"{missing} must be given too: a process finds the others with --coordinator, "
                "--num_processes and --process_id, or in a cluster with none of them"
            )
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"--coordinator must be host:port, got {address!r}")
        if not 0 <= index < count:
            raise UserError(f"--process_id must be 0 to {count - 1}, got {index}")

    @property
    def address(self) -> str | None:
        return self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")


@contextlib.contextmanager
def distributed_run(options: LaunchOptions) -> Iterator[bool]:
    """Context manager for a run on all its processes, which ends all of them when one fails.

    A process that fails prints why. The others then end as well and name it, at most
    `lost_timeout` and a few seconds later. If process 0 is killed, JAX's service dies with it and
    JAX aborts the others at once, with its own message.

    With one process this does nothing.

    Yields:
      Whether this process prints the results.

    Raises:
      UserError: the processes cannot be connected.
      SystemExit: all of several processes failed in the same way; each has printed why.
    """
    if not initialize(options):
        yield True
        return
    watchdog = _Watchdog(options.lost_timeout)
    watchdog.start()
    try:
        watchdog.hosts = multihost.allgather(socket.gethostname())
        if jax.process_index() > 0:  # when process 0 dies, JAX's message does not name its host
            _log(f"{_this_process()} is up; all depend on process 0 ({watchdog.hosts[0]})")
        yield jax.process_index() == 0
        multihost.allgather("end")
    except BaseException as error:
        _exit_on_error(error, watchdog, options.lost_timeout)
    watchdog.stop()


def initialize(options: LaunchOptions) -> bool:
    """Connects the processes of a run; returns whether there are several.

    Outside a cluster it starts nothing. If processes are missing after `start_timeout`, the program
    ends with exit code 2.

    Raises:
      UserError: the processes cannot be connected.
    """
    count, index, place = _expected_processes(options)
    if count == 1:
        return False
    name = f"process {index} of {count}"
    if count:
        _log(f"{name}: waiting for all at {place}, up to {options.start_timeout} s")
    # JAX's handler would swallow SIGTERM; `PreemptionHandler` has its own.
    jax.config.update("jax_enable_preemption_service", False)

    def give_up() -> None:
        if not count:
            _log(
                "error: the processes of this run did not all start within "
                f"{options.start_timeout} s"
            )
            exit_now(2)
        _log(
            f"error: {name}: not all came to {place} within {options.start_timeout} s. Check that "
            "all were started, under SLURM by srun, with the same address and number of processes; "
            "that process 0 runs there; and that its port is free, and open to the other hosts "
            "(firewall). With --num_processes=1 a process runs alone."
        )
        exit_now(2)

    # When JAX's own timeout expires it aborts without saying what to do.
    timer = threading.Timer(options.start_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            initialization_timeout=options.start_timeout + _JAX_MARGIN,
            heartbeat_timeout_seconds=options.lost_timeout + _JAX_MARGIN,
            shutdown_timeout_seconds=options.lost_timeout,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, ValueError) and _NO_CLUSTER in str(error):
            return False
        raise UserError(
            f"the processes cannot be started together: {first_line(error)}\n"
            "Give --coordinator, --num_processes and --process_id, or --num_processes=1 to run "
            "alone."
        ) from error
    finally:
        timer.cancel()
    return jax.process_count() > 1


def _expected_processes(options: LaunchOptions) -> tuple[int, int, str]:
    """Returns the number of processes, this one's index, and where they meet.

    The number is 0 if only JAX can find out.
    """
    if options.num_processes is not None:
        return options.num_processes, options.process_id or 0, str(options.address)
    for name, (count_variable, index_variable, *others) in _LAUNCHERS.items():
        count = int(os.environ.get(count_variable, 0))
        if count == 1 or (count and {index_variable, *others} <= os.environ.keys()):
            index = int(os.environ.get(index_variable, 0))
            return count, index, f"the first host that {name} gives"
        if count and name == "Open MPI":
            raise UserError(
                f"mpirun started {count} processes, but this version of Open MPI does not say "
                "where they find each other: give --coordinator=host:port "
                f"--num_processes=${count_variable} --process_id=${index_variable}"
            )
        if count:
            _log(
                f"note: {name} has {count} tasks for this job, but srun did not start this "
                "process: it runs alone"
            )
    return 0, 0, "process 0"


class _Watchdog(threading.Thread):
    """Thread that ends this process when another one no longer answers, and names that one.

    A collective with a missing process can wait forever, above all on TPUs and GPUs. So the
    watchdogs of all processes meet regularly at a barrier of JAX's service.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.hosts: list[str] = []
        self._timeout = timeout
        self._stopped = threading.Event()
        self._barrier = orbax_multihost.get_barrier_sync_fn()

    def stop(self) -> None:
        self._stopped.set()

    def wait_at_barrier(self, name: str, seconds: float) -> Exception | None:
        """Waits for all processes; returns the error if they do not come."""
        try:
            self._barrier(key=f"deeplab_jax_{name}", timeout_ms=int(seconds * 1000))
        except Exception as error:  # JAX does not document its type
            return error
        return None

    def run(self) -> None:
        for turn in itertools.count():
            if self._stopped.wait(_PERIOD):
                return
            error = self.wait_at_barrier(str(turn), self._timeout)
            if error is not None and not self._stopped.is_set():
                self._exit_on_lost_process(error)

    def _exit_on_lost_process(self, error: Exception) -> NoReturn:
        lost = missing_processes(str(error))
        names = [f"process {n} ({self.hosts[n]})" if self.hosts else f"process {n}" for n in lost]
        _log(
            f"error: {_this_process()}: {' and '.join(names) or 'some process'} gave no answer for "
            f"{self._timeout:g} s: lost, or ended by an error that its own output shows. "
            "Start all processes again: the run resumes from its last checkpoint."
            + ("" if lost else f" ({first_line(error)})")
        )
        if jax.process_index() == 0:  # its service is still informing the others
            time.sleep(_PERIOD)
        exit_now(1)


def missing_processes(message: str) -> list[int]:
    """Parses the processes that a barrier's error names, as "3" or "/job:.../task:3"."""
    named = re.search(r"timed out task names:\s*((?:\S*\d\s+)+)", message + "\n")
    return sorted({int(n) for n in re.findall(r"(\d+)\s", named[1])}) if named else []


def _exit_on_error(error: BaseException, watchdog: _Watchdog, lost_timeout: float) -> NoReturn:
    """Prints why this process fails, and ends it so that the others end too."""
    code = 1
    match error:
        case UserError() | OSError(errno=errno.ENOSPC):
            code = getattr(error, "exit_code", UserError.exit_code)
            _log(f"error: {_this_process()}: {error}")
        case KeyboardInterrupt():
            code = 130
            _log(f"{_this_process()}: interrupted")
        case SystemExit():
            code = error.code if isinstance(error.code, int) else 1
        case _:
            text = str(error)
            is_jax = isinstance(error, jax.errors.JaxRuntimeError)
            if (is_jax and "RESOURCE_EXHAUSTED" not in text) or "Gloo" in text or "NCCL" in text:
                _log(f"{_this_process()}: {first_line(error)}\nlooking for a lost process ...")
                watchdog.join(lost_timeout + _WATCHDOG_MARGIN)  # it ends the program
            traceback.print_exception(error)
    watchdog.stop()
    if watchdog.wait_at_barrier("farewell", _FAREWELL) is None:
        raise SystemExit(code)  # all processes failed in the same way
    if jax.process_index() == 0:
        # JAX's service ends with this process and JAX aborts the others: let them report first.
        time.sleep(lost_timeout + _WATCHDOG_MARGIN)
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """Ends this process without Python's exit handlers.

    When a process is missing, a normal exit would hang: JAX waits for all processes and for
    running collectives.
    """
    if sys.stderr.isatty():
        sys.stderr.write("\033[?25h")  # a progress bar may have hidden the cursor
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _this_process() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()})"


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
