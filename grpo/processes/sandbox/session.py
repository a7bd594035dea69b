"""A persistent interpreter in the sandbox, seen from outside: runs pieces of code that share their definitions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from grpo.processes import tree
from grpo.processes.child import ending
from grpo.processes.sandbox.cell import UNBUILT, Cell, End, Limits

INTERPRETER = Path(__file__).with_name("interpreter.py")
START_SECONDS = 30.0
"""Seconds for an interpreter to start, which takes only a moment unless the machine is busy."""
KEPT = 1 << 16
"""Bytes of output that are kept from the beginning, and from the end."""
LARGEST_ANSWER = 1 << 18


@dataclass(frozen=True, slots=True)
class Ran:
    """The result of a piece of code.

    printed    the output of the code and of all processes that it started; of long output the beginning and the end
    value      the `repr` of its last expression's value, None if there is none
    error      the traceback of the exception that it raised, None if it raised nothing
    lost       why the interpreter is gone, with all its definitions; None if it is still running
    """

    printed: str
    value: str | None = None
    error: str | None = None
    lost: str | None = None


class Interpreter:
    """A Python interpreter in the sandbox, started on first use. Not thread-safe.

    Between two pieces of code the interpreter is stopped, and the processes that the code started are killed: it uses
    no processor time and no additional memory. None of its processes outlives this object.
    """

    def __init__(self, limits: Limits, unsafe: bool = False, seed: int = 0) -> None:
        """The `seconds` of the limits apply to each piece of code. With `unsafe` there is no sandbox, only limits.

        `seed` determines the random numbers of `random`, `secrets` and numpy in the interpreter.
        """
        self.limits, self.unsafe, self.seed = limits, unsafe, seed
        self._running: _Running | None = None

    def run(self, code: str) -> Ran:
        """Run a piece of code in the same interpreter as before; if that is gone, in a new one.

        Raises RuntimeError if the sandbox cannot be built.
        """
        if self._running is None:
            self._running = _Running(self.limits, self.unsafe, self.seed)
        try:
            ran = self._running.run(code)
        except BaseException:
            self.end()
            raise
        if ran.lost is not None:
            self.end()
        return ran

    def end(self) -> None:
        """End the interpreter, if there is one. The next piece of code gets a new interpreter."""
        if self._running is not None:
            self._running.end()
            self._running = None


class _Running:
    """A running interpreter."""

    def __init__(self, limits: Limits, unsafe: bool, seed: int) -> None:
        self._limits = limits
        self._channel, far_end = socket.socketpair()
        text = INTERPRETER.read_text(encoding="utf-8")
        arguments = ["-s", "-P", "-B", "-c", text, str(seed)]  # not -I, which ignores PYTHONHASHSEED
        limits = replace(limits, each_process=False)
        with far_end:
            self._cell = Cell(arguments, limits, unsafe, far_end.fileno(), subprocess.STDOUT)
        self._calls, self._tape, self._said = 0, _Tape(), bytearray()
        try:
            self._await_hello()
        except BaseException:
            self.end()
            raise
        self._own = self._cell.pids()
        self._stand_still()

    def end(self) -> None:
        self._channel.close()
        self._cell.end()

    def run(self, code: str) -> Ran:
        self._calls += 1
        self._tape, self._said = _Tape(), bytearray()
        end = End.CODE
        with contextlib.suppress(OSError):  # the interpreter is gone, or does not read
            os.kill(self._own[-1], signal.SIGCONT)
            self._channel.settimeout(self._limits.seconds)
            self._channel.sendall(json.dumps({"call": self._calls, "code": code}).encode() + b"\n")
            end = self._watch(self._limits.seconds)
        there = self._stand_still()
        answer = self._answer() if there and end is End.CODE else None
        if answer is None:
            return Ran(self._printed(), lost=self._why(end))
        return Ran(self._printed(), answer["value"], answer["error"])

    def _await_hello(self) -> None:
        self._watch(START_SECONDS)
        if self._answer() is not None:
            return
        said = self._printed().strip()
        code = self._ended()
        if code == UNBUILT:
            raise RuntimeError(f"the sandbox cannot be built: {said}")
        raise RuntimeError(f"the interpreter did not start in {START_SECONDS:g} s ({code=}): {said}")

    def _watch(self, seconds: float) -> End:
        """Wait for an answer, and record the output meanwhile."""
        stdout = self._cell.process.stdout
        assert stdout is not None

        def answer(part: bytes) -> bool:
            self._said.extend(part)
            return not part or self._answer() is not None or len(self._said) > LARGEST_ANSWER

        return self._cell.watch({self._channel.fileno(): answer, stdout.fileno(): self._tape.take}, seconds)

    def _answer(self) -> dict[str, str | None] | None:
        """The answer to the newest call, or None. The code may have written anything else to the channel, too."""
        for line in self._said.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                answer = json.loads(line)
                found = {name: answer[name] for name in ("value", "error")}
                if answer["call"] == self._calls and all(isinstance(text, str | None) for text in found.values()):
                    return found
        return None

    def _printed(self) -> str:
        """The output so far, the rest of the pipe included."""
        stdout = self._cell.process.stdout
        assert stdout is not None
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(stdout.fileno(), False)
            while part := os.read(stdout.fileno(), KEPT):
                self._tape.take(part)
        return self._tape.text()

    def _stand_still(self) -> bool:
        """Stop the interpreter, and kill its child processes. Returns whether the interpreter is still there."""
        with contextlib.suppress(ProcessLookupError):
            if sys.platform == "linux":  # elsewhere a stopped interpreter would outlive this process
                os.kill(self._own[-1], signal.SIGSTOP)
        killed: set[int] = set()
        while new := {*self._cell.pids()} - {*self._own} - killed:  # killed processes can start no others
            for pid in new:
                tree.end(pid)
            killed |= new
        return self._ended(0.0) is None

    def _why(self, end: End) -> str:
        if end is End.TIME:
            return f"not done in {self._limits.seconds:g} s"
        if end is End.MEMORY:
            return f"its processes together held more than {self._limits.memory_mb} MB"
        code = self._ended()
        if code is None:
            return "it sent an invalid answer"
        return f"it ended: {ending(128 - code if code > 128 else code)}"

    def _ended(self, seconds: float = 1.0) -> int | None:
        """The exit code, once the interpreter has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._cell.process.wait(seconds)
        return None


@dataclass(slots=True)
class _Tape:
    """The beginning and the end of the output."""

    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    left_out: int = 0

    def take(self, part: bytes) -> bool:
        room = max(0, KEPT - len(self.head))
        self.head += part[:room]
        self.tail += part[room:]
        if (over := len(self.tail) - KEPT) > 0:
            del self.tail[:over]
            self.left_out += over
        return False

    def text(self) -> str:
        gap = f"\n[{self.left_out:,} bytes left out]\n".encode() if self.left_out else b""
        return (self.head + gap + self.tail).decode(errors="replace")
