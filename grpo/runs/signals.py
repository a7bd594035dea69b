"""Stop requests: a first SIGINT, SIGTERM, SIGHUP or SIGQUIT asks a run to stop without loss; a second one ends it.

A second SIGHUP is ignored: when a terminal closes, both the terminal and its shell send a SIGHUP.
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
"""Signals that stay ignored if the process already ignores them: `nohup` lets a run outlive its terminal that way."""
BY_CODE = 0
"""Instead of a signal's number: code requested the stop with `StopRequest.ask`."""
SOON = 0.01
"""Seconds after which a Stopped that Python could not raise is raised again."""


class Stopped(KeyboardInterrupt):
    """Raised for a signal that came where work may be left unfinished.

    Other people's code may be running at that moment: a reward or a loss. Because it is a KeyboardInterrupt, it passes
    through `except Exception`, and asyncio ends its event loop instead of storing the exception in a task.
    """


class StopRequest:
    """Inside its `with` block, a first signal is recorded here instead of ending the process; a second one ends it."""

    def __init__(
        self,
        notice: Callable[[], None] = lambda: None,
        asking: Sequence[int] = ASKING,
        second: Callable[[int], Any] | None = None,
    ) -> None:
        """`notice` is called at the first signal, to inform the user. `asking` are the signals that request a stop.

        `second` returns the handler for a second signal of a given number. The default ends the process immediately.
        """
        self.signal: int | None = None
        self._notice = notice
        self._asking, self._second = asking, second or _at_once
        self._former: dict[int, Any] = {}
        self._interrupts = self._held = False
        self._former_hook: Callable[[Any], Any] = sys.unraisablehook

    @classmethod
    def in_a_session(cls, notice: Callable[[], None] = lambda: None) -> StopRequest:
        """A request for a process that is not only the run's: a notebook, a script.

        Only Ctrl-C requests a stop, and only if Python itself would raise KeyboardInterrupt: handlers that the session
        has set stay, and other signals keep their effect. A second Ctrl-C raises KeyboardInterrupt immediately.
        """
        in_main = threading.current_thread() is threading.main_thread()
        free = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return cls(notice, (signal.SIGINT,) if free else (), lambda _: signal.default_int_handler)

    def ask(self) -> None:
        """Request a stop from code, such as a callback: the run ends after the step that was just finished."""
        self.signal = BY_CODE if self.signal is None else self.signal

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def _lost(self) -> bool:
        """Whether a signal came in a block before `hold`, so that the result of the block must be dropped."""
        return self.requested and not self._held

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """A block that raises Stopped at the first signal, as soon as Python code runs.

        That is between two computations of MLX: a micro-batch that has started is finished first. If other people's
        code swallows the exception, or raises another instead, the block still ends with Stopped, because its result
        must be dropped. After `hold`, a signal waits for the end of the block, and the result is kept.
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
        """Finish the rest of the `interrupts` block: from here on, a first signal is only recorded.

        Raises Stopped if a signal came earlier, because other people's code may have swallowed the exception. Outside
        of `interrupts`, where nothing is interrupted, this does nothing.
        """
        if not self._interrupts:
            return
        if self.requested:
            raise Stopped
        self._interrupts = False  # before this line a signal raises Stopped by itself; after it, no signal does
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
        for second in self._former:  # first, so that a second signal has its effect during anything that follows
            signal.signal(second, self._second(second))
        with suppress(OSError):  # the terminal itself may be gone
            self._notice()
        if self._interrupts:
            raise Stopped

    def _unraisable(self, unraisable: Any) -> None:
        """The hook for exceptions that Python could not raise: from a weak reference's callback or from `__del__`.

        A Stopped is raised again from outside of this call, because here it would be lost again.
        """
        if not issubclass(unraisable.exc_type, Stopped):
            self._former_hook(unraisable)
        else:
            _thread.start_new_thread(self._raise_again, ())

    def _raise_again(self) -> None:
        """Raise Stopped in the main thread, if that may still be interrupted. Runs in a thread of its own."""
        raising, main = ctypes.pythonapi.PyThreadState_SetAsyncExc, threading.main_thread().ident
        given = ctypes.c_ulong(main or 0), ctypes.py_object(Stopped)
        time.sleep(SOON)
        if self._interrupts:  # no other thread runs between this line and the end of the next
            raising(*given)


def _at_once(number: int) -> Any:
    return signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL
