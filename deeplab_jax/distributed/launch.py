"""One run on many processes: they start together, and none outlives another.

JAX does the work: `jax.distributed` finds the processes of a Cloud TPU, of SLURM and of Open MPI
by itself, and a service on process 0 tells them of each other. What is here makes every wait end,
with words for what went wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
from orbax.checkpoint import multihost as orbax_multihost

from deeplab_jax.distributed import multihost
from deeplab_jax.utils.errors import UserError

_PERIOD = 2.0  # seconds between the turns of the watch
_MARGIN = 40  # seconds by which JAX's own verdict, an abort in its own words, comes later
_PATIENCE = 10.0  # seconds beyond `lost_timeout` in which a watch, waiting its turn, has judged
_FAREWELL = 3.0  # seconds in which processes that fail alike meet
_NO_CLUSTER = "coordinator_address should be defined"  # of jax.distributed, on a plain machine

# Set for each process by the launchers that JAX knows: (what it needs of them, number of
# processes, number of this one).
_LAUNCHERS = {
    "SLURM": (
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"),
        "SLURM_NTASKS",
        "SLURM_PROCID",
    ),
    "Open MPI": (("OMPI_MCA_orte_hnp_uri",), "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a process finds the others.

    Attributes:
      coordinator: "host:port" of process 0; None: as the cluster says, if there is one.
      num_processes: of the run; None: as the cluster says; 1: run alone, whatever it says.
      process_id: of this one, from 0; None: as the cluster says.
      start_timeout: seconds in which all must have come.
      lost_timeout: seconds without an answer after which a process counts as lost.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout: int = 300
    lost_timeout: int = 60

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be."""
        count, number = self.num_processes, self.process_id
        if count is not None and count < 1:
            raise UserError(f"--num_processes must be 1 or more, got {count}")
        if min(self.start_timeout, self.lost_timeout) < 1:
            raise UserError("--start_timeout and --lost_timeout must be 1 second or more")
        if count == 1:
            return
        address = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        given = {"--coordinator": address, "--num_processes": count, "--process_id": number}
        missing = [name for name, value in given.items() if value is None]
        if missing and (self.coordinator, count, number) != (None, None, None):
            raise UserError(
                f"{' and '.join(missing)} must be given too: for a process to find the others it "
                "takes --coordinator, --num_processes and --process_id, or none of them"
            )
        if address is None or count is None or number is None:
            return
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"--coordinator must be host:port, got {address!r}")
        if not 0 <= number < count:
            raise UserError(f"--process_id must be 0 to {count - 1}, got {number}")


@dataclasses.dataclass(frozen=True)
class _Expected:
    """The processes that should come, as flags or a launcher say."""

    count: int
    number: int
    place: str
    advice: str = ""


@contextlib.contextmanager
def started(launch: Launch) -> Iterator[bool]:
    """The run, within: with all its processes, which all end when one of them fails.

    A process that fails says what failed and where; the others then end too, naming it, at the
    latest `lost_timeout` and some seconds later. Process 0 is the exception: JAX's service goes
    with it, and if it is killed JAX ends the others within a moment, in words of its own.

    With one process this does nothing.

    Yields:
      Whether this is the process that speaks for all.

    Raises:
      UserError: the processes cannot be brought together.
      SystemExit: of several processes, all failed alike; each has said why.
    """
    if not start(launch):
        yield True
        return
    watch = _Watch(launch.lost_timeout)
    watch.start()
    try:
        watch.hosts = multihost.allgather(multihost.host())
        if jax.process_index() > 0:  # the one message that JAX cannot give when it is needed
            _say(f"{_us()} is up; all depend on process 0 ({watch.hosts[0]})")
        yield jax.process_index() == 0
        multihost.allgather("end")
    except BaseException as error:
        _fail(error, watch, launch.lost_timeout)
    watch.end()


def start(launch: Launch, environment: Mapping[str, str] = os.environ) -> bool:
    """Brings the processes of a run together; whether there are several.

    On a plain machine it returns at once, and nothing was started.

    Raises:
      UserError: it cannot be done, as far as this can be told before `start_timeout`; then the
        program ends with exit code 2.
    """
    expected = _expect(launch, environment)
    if launch.num_processes == 1 or (expected is not None and expected.count == 1):
        return False
    if expected is not None:
        _say(
            f"process {expected.number} of {expected.count}: waiting for all at {expected.place}, "
            f"up to {launch.start_timeout} s"
        )
    # Its handler would swallow SIGTERM until somebody asks for it; `PreemptionHandler` has its own.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _deadline(launch.start_timeout, _nobody_came(expected, launch.start_timeout)):
            jax.distributed.initialize(
                launch.coordinator,
                launch.num_processes,
                launch.process_id,
                initialization_timeout=launch.start_timeout + _MARGIN,
                heartbeat_timeout_seconds=launch.lost_timeout + _MARGIN,
                shutdown_timeout_seconds=launch.lost_timeout,
            )
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, ValueError) and _NO_CLUSTER in str(error):
            return False
        raise UserError(
            f"the processes cannot be started together: {_first_line(error)}\n"
            "Give --coordinator, --num_processes and --process_id, or --num_processes=1 to run "
            "alone."
        ) from error
    return jax.process_count() > 1


def _expect(launch: Launch, environment: Mapping[str, str]) -> _Expected | None:
    """What is known of the processes before any is asked."""
    if launch.num_processes is not None and launch.process_id is not None:
        place = launch.coordinator or environment["JAX_COORDINATOR_ADDRESS"]
        return _Expected(launch.num_processes, launch.process_id, place)
    for name, (needed, count, number) in _LAUNCHERS.items():
        if int(environment.get(count, 1)) == 1 and count in environment:
            return _Expected(1, 0, name)
        if count not in environment:
            continue
        processes = int(environment[count])
        if all(variable in environment for variable in (*needed, number)):
            return _Expected(
                processes,
                int(environment[number]),
                f"the first host that {name} gives",
                f" {name} says that there are {processes} ({count}): start with its launcher "
                "(srun, mpirun), or give --num_processes=1 to run alone.",
            )
        if number == "OMPI_COMM_WORLD_RANK":
            raise UserError(
                f"mpirun started {processes} processes, but this version of Open MPI does not say "
                "where they find each other: give --coordinator=host:port "
                "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK"
            )
        _say(
            f"note: {name} has {processes} tasks for this job, but srun did not start this "
            "process: it runs alone"
        )
    return None


def _nobody_came(expected: _Expected | None, seconds: int) -> str:
    if expected is None:
        return f"the processes of this run did not all start within {seconds} s"
    return (
        f"of {expected.count} processes not all came to {expected.place} within {seconds} s; this "
        f"is process {expected.number}. Look whether all were started, with the same address and "
        "number of processes; whether process 0 runs there; and whether its port is free, and "
        f"open to the other hosts (firewall).{expected.advice}"
    )


@contextlib.contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends the program after a time: JAX's own timeout aborts it, with no word on what to do."""

    def end() -> None:
        _say(f"error: {message}")
        leave(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Watch(threading.Thread):
    """Asks all processes for an answer, turn by turn; ends this one, by name, when one is missing.

    A collective in which a process is missing can wait for ever, on TPUs and GPUs above all. So
    this thread of each process meets those of the others at a barrier of JAX's service.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(daemon=True, name="watch")
        self.hosts: list[str] = []
        self._timeout = timeout
        self._ended = threading.Event()
        self._barrier = orbax_multihost.get_barrier_sync_fn()

    def end(self) -> None:
        """Answers no more."""
        self._ended.set()

    def met(self, name: str, seconds: float) -> bool:
        """Whether all processes came to a barrier."""
        try:
            self._barrier(key=f"deeplab_jax_{name}", timeout_ms=int(seconds * 1000))
        except Exception:  # of a type that JAX does not promise
            return False
        return True

    def run(self) -> None:
        for turn in itertools.count():
            if self._ended.wait(_PERIOD):
                return
            try:
                self._barrier(key=f"deeplab_jax_{turn}", timeout_ms=int(self._timeout * 1000))
            except Exception as error:
                if not self._ended.is_set():
                    self._judge(error)
                return

    def _judge(self, error: Exception) -> NoReturn:
        lost = missing_processes(str(error))
        names = [f"process {n} ({self.hosts[n]})" if self.hosts else f"process {n}" for n in lost]
        _say(
            f"error: {_us()}: {' and '.join(names) or 'some process'} gave no answer for "
            f"{self._timeout:g} s: lost, or ended by an error that its own output tells. "
            "Start all processes again: the run goes on from its last checkpoint."
            + ("" if lost else f" ({_first_line(error)})")
        )
        if jax.process_index() == 0:  # the others are still being told, by the service here
            time.sleep(_PERIOD)
        leave(1)


def missing_processes(message: str) -> list[int]:
    """The processes that a barrier's error names: by number alone, or "/job:.../task:3"."""
    named = re.search(r"timed out task names:\s*((?:\S*\d\s+)+)", message + "\n")
    if named is None:
        return []
    return sorted({int(re.search(r"\d+$", task)[0]) for task in named[1].split()})  # type: ignore[index]


def _fail(error: BaseException, watch: _Watch, lost_timeout: float) -> NoReturn:
    """Says why this process fails, and ends it so that the others end too."""
    code = 1
    if isinstance(error, UserError):
        code = 2
        _say(f"error: {_us()}: {error}")
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        code = 2
        _say(f"error: {_us()}: the disk is full ({error.filename or 'while writing'})")
    elif isinstance(error, KeyboardInterrupt):
        code = 130
        _say(f"{_us()}: interrupted")
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    else:
        if _may_be_a_loss(error):
            _say(f"{_us()}: {_first_line(error)}\nlooking which process was lost ...")
            watch.join(lost_timeout + _PATIENCE)  # the watch ends the program
        traceback.print_exception(error)
    watch.end()
    if watch.met("farewell", _FAREWELL):
        raise SystemExit(code)  # all end here, by the same mistake: in peace
    if jax.process_index() == 0:
        # JAX's service ends with this process, and then all others abort: the watch comes first.
        time.sleep(lost_timeout + _PATIENCE)
    leave(code)


def _may_be_a_loss(error: BaseException) -> bool:
    """Whether an error can come of a collective in which a process was missing."""
    text = str(error)
    runtime = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
    return runtime or "Gloo" in text or "NCCL" in text


def leave(code: int) -> NoReturn:
    """Ends this process without goodbye.

    When a process is missing, a normal end would not come: JAX waits for all of them at exit, and
    then aborts; collectives under way wait too.
    """
    if sys.stderr.isatty():
        sys.stderr.write("\033[?25h")  # a progress bar may have hidden the cursor
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _us() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} ({multihost.host()})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
