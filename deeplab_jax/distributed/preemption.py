"""Signals that ask a run to stop: it saves first."""

from __future__ import annotations

import functools
import signal
import threading
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32


class PreemptionHandler:
    """While entered, SIGTERM and Ctrl-C ask for a stop and do nothing else; a second one acts.

    Outside the main thread, where Python takes no handlers, nothing is ever asked.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self._number = 0
        self._previous: dict[signal.Signals, object] = {}
        self._asked: Int32[Array, ""] | None = None

    def should_stop(self) -> bool:
        """Whether to stop now: the same answer in all processes, as each asks equally often.

        A signal to one process stops all. With several processes the answer is that of the call
        before, so that no device is waited for.
        """
        number = self._number
        if jax.process_count() > 1:
            asked, self._asked = self._asked, _largest(number)
            number = 0 if asked is None else int(jax.device_get(asked))
        if number:
            self.name = signal.Signals(number).name
        return bool(number)

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __exit__(self, *_: object) -> None:
        self._restore()


def _largest(number: int) -> Int32[Array, ""]:
    """The largest of the processes' numbers, which is being computed."""
    sharding, largest = _maximum()
    numbers = jax.make_array_from_callback(
        (jax.device_count(),), sharding, lambda index: np.array([number], np.int32)
    )
    return largest(numbers)


@functools.cache
def _maximum() -> tuple[NamedSharding, jax.stages.Wrapped]:
    mesh = Mesh(np.array(jax.devices()), "all")
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.max, out_shardings=everywhere)
