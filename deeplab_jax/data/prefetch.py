"""Makes batches ahead of time, in worker processes or threads.

Worker processes write batches into slots of memory that they share with this process. A batch is
handed out without a copy, and its slot is used again when no array refers to it any longer.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import math
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

import cloudpickle
import cv2
import numpy as np

from deeplab_jax.utils.errors import UserError

_MAX_THREADS = 8
_MAX_HELD = 4  # slots that the consumer may hold; it gets further batches as copies
_ALIGNMENT = 64  # bytes; JAX can then use host memory on CPU without a copy
_TASK = struct.Struct("qq")  # a step and its slot
# By default, memory of the size of an image returns to the system after each image, and the page
# faults of the next one take 0.5 of the 3 ms that an image of VOC takes.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**27)}

# Ctrl-C and SIGTERM often go to all processes of a group. Only the training process may react: it
# may want another batch, which dead workers, each with a traceback, could not make.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

B = TypeVar("B")
Shapes = Mapping[str, tuple[int, ...]]  # of the arrays of a batch, uint8, by name
# Returns the batch of a step, in arrays that it may fill.
Make = Callable[[int, dict[str, np.ndarray]], Any]


class BatchIterator(Iterator[B], Generic[B]):
    """Iterates over batches that worker processes, or threads of this process, make ahead of time.

    The workers start at once. They end at `close()`, at the end of a `with` block, after the last
    batch, after any error and with the program.
    """

    def __init__(
        self, make: Make, steps: range, num_workers: int = 0, shapes: Shapes | None = None
    ) -> None:
        """Starts the workers.

        Args:
          make: called as `make(step, arrays)` with new arrays of `shapes`. For processes, it must
            be picklable by cloudpickle, and the filled arrays are the batch.
          steps: of the batches.
          num_workers: number of processes; 0: one thread per CPU.
          shapes: of the arrays.
        """
        # Processes and threads that start now keep the signals blocked.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            batches = (
                _Processes(make, steps, shapes or {}, num_workers)
                if num_workers
                else _Threads(make, steps, shapes or {})
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        self._batches: Iterator[Any] = batches
        self._close = weakref.finalize(self, batches.close)

    def __next__(self) -> B:
        try:
            return next(self._batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers and waits for them. The iterator is then empty."""
        self._batches = iter(())
        self._close()

    def __enter__(self) -> BatchIterator[B]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def empty_arrays(shapes: Shapes) -> dict[str, np.ndarray]:
    return {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}


class _Threads(Iterator[Any]):
    """Batches from threads of this process."""

    def __init__(self, make: Make, steps: range, shapes: Shapes) -> None:
        num_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
        pool = self._pool = concurrent.futures.ThreadPoolExecutor(num_threads)
        self._submitted = (pool.submit(make, step, empty_arrays(shapes)) for step in steps)
        self._ahead = collections.deque(itertools.islice(self._submitted, num_threads))

    def __next__(self) -> Any:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft().result()
        self._ahead.extend(itertools.islice(self._submitted, 1))
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Processes(Iterator[Any]):
    """Batches from worker processes, which take the steps in order, each when it is free."""

    def __init__(self, make: Make, steps: range, shapes: Shapes, num_workers: int) -> None:
        self._shapes = shapes
        self._min_ahead = 2 * num_workers  # number of steps that workers always have
        num_slots = min(self._min_ahead + _MAX_HELD, len(steps))
        self._steps, self._free = iter(steps), collections.deque(range(num_slots))
        self._slots: dict[int, int] = {}  # the slot of each step that workers have, in order
        self._made: dict[int, Exception | None] = {}  # what they answered for these steps
        self._workers: dict[Any, subprocess.Popen] = {}
        pickled, end = cloudpickle.dumps((make, shapes)), num_slots * _slot_bytes(shapes)
        file = _anonymous_file(end + len(pickled))
        self._tasks = os.pipe()  # workers read from the same end
        try:
            self._memory = mmap.mmap(file, 0)
            self._memory[end:] = pickled
            for _ in range(num_workers):
                self._start_worker(file, end)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(file)
        self._assign()

    def _start_worker(self, file: int, end: int) -> None:
        ours, theirs = Pipe()
        with theirs:
            files = (file, self._tasks[0], theirs.fileno())
            # multiprocessing would also import the program's main module and all that it imports.
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import work; "
                f"work{(*files, end)}"
            )
            self._workers[ours] = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=files,
                env=_KEEP_MEMORY | os.environ,
            )

    def __next__(self) -> Any:
        self._assign()
        if not self._slots:
            raise StopIteration
        step = next(iter(self._slots))
        while True:
            # Looks for dead workers even if the batch is there.
            for connection in wait(list(self._workers), 0 if step in self._made else None):
                self._receive(connection)
            if step in self._made:
                break
        slot, error = self._slots.pop(step), self._made.pop(step)
        if error is not None:
            raise error
        memory, batch = _open_slot(self._memory, self._shapes, slot)
        if len(self._slots) >= self._min_ahead:  # `memory` lives as long as its views
            weakref.finalize(memory, self._free.append, slot).atexit = False
            return batch
        self._free.append(slot)
        return {name: array.copy() for name, array in batch.items()}

    def _assign(self) -> None:
        """Gives the next steps and the free slots to the workers."""
        for step in itertools.islice(self._steps, len(self._free)):
            self._slots[step] = self._free.popleft()
            os.write(self._tasks[1], _TASK.pack(step, self._slots[step]))

    def _receive(self, connection: Any) -> None:
        try:
            step, self._made[step] = connection.recv()
        except (EOFError, OSError):
            worker = self._workers[connection]
            code = worker.wait()
            cause = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"code {code}"
            raise UserError(
                f"one of {len(self._workers)} processes that prepare batches (pid {worker.pid}) "
                f"ended with {cause}. Its own message, if any, is above. If memory ran out, set "
                "config.data.num_workers or config.data.crop_size lower."
            ) from None

    def close(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        for connection, worker in self._workers.items():
            worker.wait()
            connection.close()
        for end in self._tasks:
            os.close(end)


def _anonymous_file(size: int) -> int:
    """Returns the descriptor of a file without a name, which ends with its last user."""
    try:
        file = os.memfd_create("batches")
        os.ftruncate(file, size)
    except OSError:  # a sandbox forbids it
        with tempfile.TemporaryFile() as unnamed:
            os.posix_fallocate(unnamed.fileno(), 0, size)
            file = os.dup(unnamed.fileno())
    return file


def _aligned_bytes(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT


def _slot_bytes(shapes: Shapes) -> int:
    return sum(map(_aligned_bytes, shapes.values()))


def _open_slot(
    memory: mmap.mmap, shapes: Shapes, index: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the bytes of a slot, and the arrays in it, which keep the bytes alive."""
    size, start, arrays = _slot_bytes(shapes), 0, {}
    slot = np.frombuffer(memory, np.uint8, size, index * size)
    for name, shape in shapes.items():
        arrays[name] = np.ndarray(shape, np.uint8, slot, start)
        start += _aligned_bytes(shape)
    return slot, arrays


def work(file: int, tasks: int, connection: int, end: int) -> None:
    """Makes batches in a worker process, until the main process ends.

    Args:
      file, tasks, connection: descriptors of the shared memory, of the pipe from which all workers
        take tasks, and of the connection to the main process.
      end: end of the slots, where the pickled function begins.
    """
    cv2.setNumThreads(0)  # there is one process per core
    main = Connection(connection)
    threading.Thread(target=_exit_with_main, args=(main,), daemon=True).start()
    memory = mmap.mmap(file, 0)
    make, shapes = pickle.loads(memory[end:])
    with contextlib.suppress(BrokenPipeError):  # the main process ended
        while task := os.read(tasks, _TASK.size):  # a pipe gives each task to one worker
            step, index = _TASK.unpack(task)
            failure: Exception | None = None
            try:
                make(step, _open_slot(memory, shapes, index)[1])
            except UserError as error:
                failure = error
            except Exception:
                text = f"a process that prepares batches:\n{traceback.format_exc()}"
                failure = RuntimeError(text)
            main.send((step, failure))


def _exit_with_main(connection: Connection) -> None:
    """Ends this worker when the main process ends, even by SIGKILL."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv_bytes()  # the main process never sends
    os._exit(1)
