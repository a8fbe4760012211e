"""Stops a run on SIGTERM, Ctrl-C or request, on all processes at the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jaxtyping import Array, Int32

from deeplab_jax.distributed import multihost

_REQUEST = 1 << 10  # larger than the number of any signal


class PreemptionHandler:
    """Context manager in which the first SIGTERM or Ctrl-C only sets a flag.

    A second signal has its usual effect. Outside the main thread, where Python allows no signal
    handlers, `should_stop` is always false.

    Attributes:
      name: what stopped the run, once `should_stop` has returned true.
    """

    def __init__(self) -> None:
        self.name = ""
        self._signal = 0
        self._previous: dict[signal.Signals, object] = {}
        self._pending: Int32[Array, ""] | None = None

    def should_stop(self) -> bool:
        """Returns whether any process has a signal or a request; the same on all processes.

        All processes must call it equally often. With several processes it returns the answer of
        the previous call, so that it never waits for a device.
        """
        number = self._signal
        if jax.process_count() > 1:
            pending, self._pending = self._pending, multihost.start_max(number)
            number = 0 if pending is None else int(jax.device_get(pending))
        if number:
            is_signal = number != _REQUEST
            self.name = signal.Signals(number).name if is_signal else "an outage of its bucket"
        return bool(number)

    def request(self) -> None:
        """Stops the run as a signal does, from any process."""
        self._signal = _REQUEST

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
