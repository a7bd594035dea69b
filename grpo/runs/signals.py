"""SIGINT, SIGTERM, SIGHUP and SIGQUIT ask a run to stop where nothing is lost; a second one ends it at once.

A second SIGHUP does not: a terminal that closes sends one, and its shell another.
"""

from __future__ import annotations

import _thread
import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
KEPT_IGNORED = (signal.SIGHUP, signal.SIGQUIT)
"""Signals that stay ignored where they are: `nohup` ignores SIGHUP so that a run outlives its terminal."""
BY_CODE = 0
"""In the place of a signal's number: code asked for the stop, by `StopRequest.ask`."""
SOON = 0.01
"""Seconds after which a Stopped is raised again that Python could not raise."""


class Stopped(KeyboardInterrupt):
    """A signal came where work may be left unfinished.

    Other people's code is running at that moment: a reward, a loss. As a KeyboardInterrupt it passes through
    `except Exception`, and asyncio ends its event loop at once instead of keeping it for a task.
    """


class StopRequest:
    """Inside its `with` block the first signal is noted here instead of ending the process; the second ends it."""

    def __init__(
        self,
        notice: Callable[[], None] = lambda: None,
        asking: Sequence[int] = ASKING,
        second: Callable[[int], Any] | None = None,
    ) -> None:
        """`notice` is called when the first signal comes, to tell the person. `asking` are the signals that ask.

        `second` gives the handler of a second signal, by its number. Default: it ends the process at once.
        """
        self.signal: int | None = None
        self._notice = notice
        self._asking, self._second = asking, second or _at_once
        self._former: dict[int, Any] = {}
        self._interrupts = self._held = False
        self._former_hook: Callable[[Any], Any] = sys.unraisablehook

    @classmethod
    def in_a_session(cls, notice: Callable[[], None] = lambda: None) -> StopRequest:
        """For a process that is not the run's own: a notebook's, a script's. Only Ctrl-C asks, and only where Python
        itself would have raised KeyboardInterrupt: a handler of the session's own stays, and so do all other signals. A
        second Ctrl-C raises KeyboardInterrupt at once.
        """
        in_main = threading.current_thread() is threading.main_thread()
        free = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return cls(notice, (signal.SIGINT,) if free else (), lambda _: signal.default_int_handler)

    def ask(self) -> None:
        """Ask for the stop from code, such as a callback's: the run ends after the step that is finished."""
        self.signal = BY_CODE if self.signal is None else self.signal

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
        for number in self._asking:
            if number in KEPT_IGNORED and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._former[number] = signal.signal(number, self._note)
        self._former_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._former_hook
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        for second in self._former:  # at once, whatever is being computed or written
            signal.signal(second, self._second(second))
        with suppress(OSError):  # the terminal may be what has gone
            self._notice()
        if self._interrupts:
            raise Stopped

    def _unraisable(self, unraisable: Any) -> None:
        """Python hands over what it could not raise: from a weak reference's callback, from `__del__`. A Stopped among
        these is raised again, from outside of this call: here it would be lost once more."""
        if not issubclass(unraisable.exc_type, Stopped):
            self._former_hook(unraisable)
        else:
            _thread.start_new_thread(self._raise_again, ())

    def _raise_again(self) -> None:
        """In a thread of its own: let the main thread raise Stopped where it is by then, if that may be left."""
        raising, main = ctypes.pythonapi.PyThreadState_SetAsyncExc, threading.main_thread().ident
        given = ctypes.c_ulong(main or 0), ctypes.py_object(Stopped)
        time.sleep(SOON)
        if self._interrupts:  # no other thread has its turn between this and the next line's end
            raising(*given)


def _at_once(number: int) -> Any:
    return signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL
