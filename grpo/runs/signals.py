"""SIGINT, SIGTERM, SIGHUP and SIGQUIT ask a run to stop where nothing is lost; a second one ends it at once.

A second SIGHUP does not: a terminal that closes sends one, and its shell another.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
KEPT_IGNORED = (signal.SIGHUP, signal.SIGQUIT)
"""Signals that stay ignored where they are: `nohup` ignores SIGHUP so that a run outlives its terminal."""


class Stopped(KeyboardInterrupt):
    """A signal came where work may be left unfinished.

    Other people's code is running at that moment: a reward, a loss. As a KeyboardInterrupt it passes through
    `except Exception`, and asyncio ends its event loop at once instead of keeping it for a task.
    """


class StopRequest:
    """Inside its `with` block the first signal is noted here instead of ending the process; the second ends it."""

    def __init__(self, notice: Callable[[], None] = lambda: None) -> None:
        """`notice` is called when the first signal comes, to tell the person."""
        self.signal: int | None = None
        self._notice = notice
        self._former: dict[int, Any] = {}
        self._interrupts = self._held = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def _lost(self) -> bool:
        """Whether a signal came in a block before `hold`, so that what the block made is not to be kept."""
        return self.requested and not self._held

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """A block that the first signal leaves, by raising Stopped, as soon as Python has its turn.

        That is between two of MLX's computations: a micro-batch that was begun is finished first. If other people's
        code swallowed the exception, or raised its own in its place, the block still ends with Stopped: what was made
        after that is not to be kept. From `hold` on a signal waits for the end of the block, which is kept.
        """
        if self.requested:
            raise Stopped
        self._interrupts, self._held = True, False
        try:
            yield
        except Exception as error:
            if self._lost:
                raise Stopped from error
            raise
        finally:
            self._interrupts = False
        if self._lost:
            raise Stopped

    def hold(self) -> None:
        """From here on what is done inside `interrupts` is to be finished: the first signal is only noted.

        Raises Stopped for a signal that came before, which other people's code may have swallowed. Outside of
        `interrupts` nothing is interrupted, and this does nothing.
        """
        if not self._interrupts:
            return
        if self.requested:
            raise Stopped
        self._interrupts = False  # before this line a signal raises Stopped from itself, after it none does
        self._held = True

    def __enter__(self) -> StopRequest:
        for number in ASKING:
            if number in KEPT_IGNORED and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        for second in self._former:  # at once, whatever is being computed or written
            signal.signal(second, signal.SIG_IGN if second == signal.SIGHUP else signal.SIG_DFL)
        with suppress(OSError):  # the terminal may be what has gone
            self._notice()
        if self._interrupts:
            raise Stopped
