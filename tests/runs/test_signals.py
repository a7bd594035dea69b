"""Signals: the first asks, and leaves what can be left; the second ends."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

from grpo.runs.signals import SOON, Stopped, StopRequest

SCRIPT = """
import os, signal, sys
from grpo.runs.signals import StopRequest
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell's background jobs ignore it
with StopRequest():
    os.kill(os.getpid(), signal.{first})
    print("asked", flush=True)
    os.kill(os.getpid(), signal.{second})
    print("still here", flush=True)
"""


def test_a_signal_is_noted_outside_and_leaves_an_interruptible_block() -> None:
    told, former = [], signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with StopRequest(lambda: told.append(1)) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.requested, stop.signal) == (True, signal.SIGTERM)
        with pytest.raises(Stopped), stop.interrupts():
            pytest.fail("entered")
    swallowing = contextlib.suppress(Exception)  # as other people's code does
    with StopRequest(lambda: told.append(2)) as stop, pytest.raises(Stopped), stop.interrupts(), swallowing:
        os.kill(os.getpid(), signal.SIGINT)
    assert told == [1, 2]
    assert stop.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is former


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("SIGINT", "SIGINT"),
        ("SIGTERM", "SIGTERM"),
        ("SIGINT", "SIGTERM"),
        ("SIGQUIT", "SIGQUIT"),
        ("SIGHUP", "SIGTERM"),
    ],
)
def test_a_second_one_ends_the_process_at_once(first: str, second: str) -> None:
    script = SCRIPT.format(first=first, second=second)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == -getattr(signal, second)  # 130 and 143 in a shell
    assert ran.stdout == "asked\n"


def test_a_terminal_that_closes_may_say_so_twice() -> None:
    """The kernel sends SIGHUP, and the shell another; and nothing can be shown there any more."""

    def gone() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with handled(signal.SIGHUP, signal.SIG_DFL), StopRequest(gone) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == signal.SIGHUP


def test_what_nohup_ignores_stays_ignored() -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN):
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@contextlib.contextmanager
def handled(number: int, handler):
    former = signal.signal(number, handler)
    yield
    signal.signal(number, former)


class Thing:
    def __init__(self, end) -> None:
        self.end = end

    def __del__(self) -> None:
        self.end()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def dies_with_a_reference() -> None:
    thing = Thing(lambda: None)
    reference = weakref.ref(thing, lambda _: interrupt())
    del thing
    assert reference() is None


def dies_itself() -> None:
    Thing(interrupt)


@pytest.mark.parametrize("dies", [dies_with_a_reference, dies_itself])
def test_where_python_raises_nothing_it_is_raised_next(dies, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the callback of a weak reference, and in `__del__`: nothing is printed, and the block is left soon."""
    printed, until = [], time.monotonic() + 20
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    def block() -> None:
        dies()
        while time.monotonic() < until:
            sum(range(1000))
        pytest.fail("the block was not left")

    with StopRequest() as stop, pytest.raises(Stopped), stop.interrupts():
        block()
    assert printed == []
    assert sys.unraisablehook == printed.append


def test_a_stop_that_is_to_wait_is_not_raised_later() -> None:
    with StopRequest() as stop, stop.interrupts():
        stop.hold()
        dies_itself()
        time.sleep(3 * SOON)
    assert stop.requested


def test_what_others_could_not_raise_is_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    with StopRequest() as stop, stop.interrupts():
        Thing(lambda: 1 / 0)
    assert told == [ZeroDivisionError]
