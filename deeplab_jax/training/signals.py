"""Signals that ask a run to stop: it saves first."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, SIGTERM and Ctrl-C set `requested` and do nothing else; a second one acts.

    Outside the main thread, where Python takes no handlers, it stays unset.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
