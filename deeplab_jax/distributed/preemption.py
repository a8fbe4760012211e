"""Stops a run on SIGTERM or Ctrl-C, on all processes at the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32


class PreemptionHandler:
    """Context manager in which the first SIGTERM or Ctrl-C only sets a flag.

    A second signal has its usual effect. Outside the main thread, where Python allows no signal
    handlers, `should_stop` is always false.

    Attributes:
      name: name of the signal, once `should_stop` has returned true.
    """

    def __init__(self) -> None:
        self.name = ""
        self._signal = 0
        self._previous: dict[signal.Signals, object] = {}
        self._pending: Int32[Array, ""] | None = None

    def should_stop(self) -> bool:
        """Returns whether any process has received a signal; the same on all processes.

        All processes must call it equally often. With several processes it returns the answer of
        the previous call, so that it never waits for a device.
        """
        number = self._signal
        if jax.process_count() > 1:
            pending, self._pending = self._pending, _max_over_processes(number)
            number = 0 if pending is None else int(jax.device_get(pending))
        if number:
            self.name = signal.Signals(number).name
        return bool(number)

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __exit__(self, *_: object) -> None:
        self._restore()


def _max_over_processes(number: int) -> Int32[Array, ""]:
    """Starts to compute the largest of the processes' numbers, without waiting for it."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "all"), PartitionSpec("all"))
    numbers = jax.make_array_from_callback(
        (jax.device_count(),), sharding, lambda index: np.array([number], np.int32)
    )
    return jnp.max(numbers)
