"""Makes batches ahead of time, in worker processes or threads."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import cv2
import grain
import numpy as np
from absl import flags
from grain._src.python.ipc.shared_memory_array import SharedMemoryArray

from deeplab_jax.utils.errors import UserError

_MAX_THREADS = 8
_BATCHES_IN_FLIGHT = 4  # per worker at the same time: made, queued, fetched, copied
_MAX_WAIT_FOR_DELETIONS = 10  # seconds; they take milliseconds unless the machine is overloaded
# The process that frees shared memory at the end of the program starts with the first worker and
# gets these options. Rarely, on a loaded machine, Grain leaves it a batch to free.
_QUIET = "ignore:resource_tracker:UserWarning"
_SHARED_MEMORY = pathlib.Path("/dev/shm")

# Ctrl-C and SIGTERM often go to all processes of a group. Only the training process may react: it
# may want another batch, which dead workers, each with a traceback, could not make.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

B = TypeVar("B")


class BatchSource(Protocol):
    """Random access to batches, each a dict of arrays. Must pickle."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Any: ...

    @property
    def nbytes(self) -> int:
        """Bytes of a typical batch."""


class BatchIterator(Iterator[B], Generic[B]):
    """Iterates over batches that worker processes, or threads of this process, make ahead of time.

    The workers start at once. They end at `close()`, at the end of a `with` block, after the last
    batch, after any error and with the program.
    """

    def __init__(self, source: BatchSource, start_step: int, num_workers: int) -> None:
        """Starts the workers.

        Args:
          source: the batches.
          start_step: index of the first batch.
          num_workers: number of processes; 0: one thread per CPU.
        """
        if num_workers and _QUIET not in sys.warnoptions:
            sys.warnoptions.append(_QUIET)
        if not flags.FLAGS.is_parsed():  # Grain reads its flags, even if absl runs no program
            flags.FLAGS.mark_as_parsed()
        num_threads = 1 if num_workers else min(len(os.sched_getaffinity(0)), _MAX_THREADS)
        dataset = (
            grain.MapDataset.source(source)
            .slice(slice(start_step, None))
            .to_iter_dataset(
                grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
            )
            .mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), _set_up_worker)
        )
        if num_workers and not _fits_shared_memory(source.nbytes * num_workers):
            dataset = grain.experimental.WithOptionsIterDataset(
                dataset, grain.experimental.DatasetOptions(min_shm_size=2**62)
            )
        self._iterator: Any = iter(dataset)
        self._close = weakref.finalize(self, _close, [self._iterator], num_workers)
        self._iterator.get_state()  # creates all workers; otherwise closing may miss some
        # Processes and threads that start now keep the signals blocked. Python starts a process for
        # the first semaphore and then unblocks the signals, so the semaphores must exist already.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._iterator.start_prefetch()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def __next__(self) -> B:
        if self._iterator is None:
            raise StopIteration
        try:
            batch: Any = next(self._iterator)
        except (UserError, StopIteration) as error:
            # The traceback refers to frames of Grain that hold a batch in shared memory.
            end = error.with_traceback(None)
        except BaseException:
            self.close()
            raise
        else:
            # Copies a worker's arrays, to free their shared memory.
            return {name: np.array(array) for name, array in batch.items()}  # type: ignore
        self.close()
        raise end

    def close(self) -> None:
        """Ends the workers and waits for them. The iterator is then empty."""
        self._iterator = None
        self._close()

    def __enter__(self) -> BatchIterator[B]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(iterators: list[Any], num_workers: int) -> None:
    """Closes the iterator in a list, which holds the last reference to it."""
    iterators.pop().close()
    if not num_workers:
        return
    # Iterators leave batches in shared memory, in reference cycles, and Grain frees them in one
    # thread, in order. If the program ended earlier, Python would warn of a leak.
    gc.collect()
    deletions = SharedMemoryArray._del_thread_pool
    if deletions is not None:
        with contextlib.suppress(ValueError):  # at the end of the program the thread may have ended
            deletions.apply_async(int).wait(timeout=_MAX_WAIT_FOR_DELETIONS)


def _fits_shared_memory(nbytes: int) -> bool:
    """Whether batches of `nbytes`, one per worker, may pass through shared memory.

    A container often has only 64 MiB of it, and SIGBUS kills a worker that writes more. Batches
    then pass through pipes, which costs a copy.
    """
    if not _SHARED_MEMORY.is_dir():
        return True
    return nbytes * _BATCHES_IN_FLIGHT < shutil.disk_usage(_SHARED_MEMORY).free


def _set_up_worker(worker: int, num_workers: int) -> None:
    del worker, num_workers
    cv2.setNumThreads(0)  # there is one process per core
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this worker when the training process ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
