"""SIGINT and SIGTERM ask a run to stop at the end of its step; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """Inside its `with` block signals are noted here instead of ending the process."""

    def __init__(self, notice: Callable[[], None] = lambda: None) -> None:
        """`notice` is called when the first signal comes, to tell the person."""
        self.signal: int | None = None
        self._notice = notice
        self._former: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        self._notice()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
