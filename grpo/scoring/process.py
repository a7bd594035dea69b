"""A reward function in a process of its own: started, asked, killed when it hangs, replaced when it dies.

A worker leads a process group, and what its function starts dies with it. A guardian process (one for all workers)
kills those groups when this process is gone, be it by SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from grpo.errors import UserError
from grpo.plugins import Located
from grpo.scoring.channel import receive, send
from grpo.scoring.contract import Answer, checked, ending
from grpo.scoring.names import check_metric
from grpo.scoring.output import Output

START_SECONDS = 120.0
"""A function's file may import what it likes; after this it counts as hung."""
PATIENCE = 3
"""Calls in a row that a worker may die in; the rest of the request is not tried then."""

_NOISE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""What comes of a worker that is gone, and of reading a message that anything may have been written into."""

Span = tuple[int, int]
"""The places of a call's completions: from, up to."""


class Worker:
    """One reward function behind a process. Not for several threads at once."""

    def __init__(self, located: Located, kwargs: Mapping[str, Any] | None, timeout: float) -> None:
        """Starts the process, and does not wait for it. Without `kwargs` it only reads what the file has for tests."""
        self.name, self.timeout = located.name, timeout
        self.calls = "step"
        self.cases: list[dict[str, Any]] = []
        self.case_kwargs: dict[str, Any] = {}
        self._output = Output(located.name)
        self._closed = False
        weakref.finalize(self, self._output.close)
        fields = tuple(getattr(located, name) for name in located.__slots__)
        self._setup = pickle.dumps({"path": sys.path, "located": fields, "kwargs": kwargs})
        self._ready = False
        self._process = _Process(self._output)
        self._greet()

    def close(self) -> None:
        """Kill the process, and what it started. A `score` that is under way in another thread ends."""
        self._closed = True
        self._process.kill()
        self._output.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the function is imported. Raises UserError if that cannot be done, and says why."""
        if self._ready:
            return
        try:
            hello = self._receive(START_SECONDS)
        except _NOISE as error:
            raise UserError(f"reward {self.name!r}: {self._died(error, START_SECONDS, 'when imported')}") from None
        if "error" in hello:
            said = hello["error"]
            raise UserError(said if said.startswith("reward ") else f"reward {self.name!r}: {said}")
        self.calls, self._ready = hello["calls"], True
        self.cases, self.case_kwargs = hello.get("cases", []), hello.get("case_kwargs", {})

    def problem(self, columns: Collection[str]) -> str | None:
        """Why the function could not be called with these columns of the dataset; None if it can be."""
        self.wait_ready()
        try:
            send(self._process.channel, pickle.dumps({"check": list(columns)}), START_SECONDS)
            problem: str | None = self._receive(START_SECONDS)["problem"]
        except _NOISE as error:
            return self._died(error, START_SECONDS, "before it was called")
        return problem

    def score(self, columns: bytes, spans: Sequence[Span], state: Mapping[str, Any]) -> Iterator[Answer]:
        """An answer for each span of the pickled columns.

        A call that takes longer than the time limit, or that the process does not survive, is a failure of its span;
        a new process goes on with the next.
        """
        self._output.begin()
        done = deaths = 0
        began = time.perf_counter()
        while done < len(spans):
            try:
                self.wait_ready()
                request = {"columns": columns, "spans": spans[done:], "state": dict(state)}
                send(self._process.channel, pickle.dumps(request), self.timeout)
                for _ in range(done, len(spans)):
                    yield _answer(self._receive(self.timeout), spans[done])
                    done, deaths, began = done + 1, 0, time.perf_counter()
            except UserError as error:  # it was imported before, and cannot be now
                yield from (Answer.failed(end - begin, str(error)) for begin, end in spans[done:])
                return
            except _NOISE as error:
                if self._closed:
                    return
                begin, end = spans[done]
                kind: Literal["error", "timeout"] = "timeout" if isinstance(error, TimeoutError) else "error"
                said = self._died(error, self.timeout, "in this call")
                yield Answer.failed(end - begin, said, kind, time.perf_counter() - began)
                self._replace()
                began = time.perf_counter()
                done, deaths = done + 1, deaths + 1
                if deaths == PATIENCE:
                    untried = f"not tried: the {PATIENCE} calls before it were the end of their processes"
                    yield from (Answer.failed(end - begin, untried) for begin, end in spans[done:])
                    return

    def _died(self, error: Exception, seconds: float, when: str) -> str:
        """Kill what is left of the process, and say in words what became of it."""
        if isinstance(error, TimeoutError):
            self._process.kill()
            return f"no answer in {seconds:g} s {when}, so its process was killed"
        code = self._process.end()
        time.sleep(0.02)  # for its last words to arrive
        if isinstance(error, ConnectionError) and code is not None:
            return f"its process ended {when} ({ending(code)}){self._output.tail()}"
        return f"its process made no sense {when} ({type(error).__name__}: {error})"

    def _replace(self) -> None:
        self._process.kill()
        self._ready = False
        self._process = _Process(self._output)
        self._greet()

    def _greet(self) -> None:
        with contextlib.suppress(OSError):  # gone already: waiting for it will tell
            send(self._process.channel, self._setup, START_SECONDS)

    def _receive(self, seconds: float) -> Any:
        return json.loads(receive(self._process.channel, seconds))


class _Process:
    """A running worker, the leader of its process group."""

    def __init__(self, output: Output) -> None:
        self.channel, theirs = socket.socketpair()
        script = Path(__file__).with_name("worker.py")
        root = str(Path(__file__).parents[2])
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", str(script), str(theirs.fileno()), root],
                stdin=subprocess.DEVNULL,
                stdout=output.descriptor,
                stderr=output.descriptor,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.pid = self._popen.pid
        _Guardian.tell(f"+{self.pid}")
        self.kill = weakref.finalize(self, _kill, self._popen, self.channel)

    def end(self, seconds: float = 1.0) -> int | None:
        """The exit code of a process that should be ending; None for one that had to be killed."""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._popen.wait(seconds)
        self.kill()
        return code


def _kill(popen: subprocess.Popen[bytes], channel: socket.socket) -> None:
    """Kill a worker's process group, and reap the worker."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it may have ended by itself
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
    channel.close()
    _Guardian.tell(f"-{popen.pid}")


class _Guardian:
    """The one guardian process, started with the first worker."""

    _lock = threading.Lock()
    _popen: subprocess.Popen[str] | None = None

    @classmethod
    def tell(cls, line: str) -> None:
        with cls._lock:
            if cls._popen is None or cls._popen.poll() is not None:
                cls._popen = cls._start()
            with contextlib.suppress(BrokenPipeError):
                print(line, file=cls._popen.stdin, flush=True)

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guardian.py"))]
        return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def _answer(reply: Any, span: Span) -> Answer:
    """A reply, read as one that anything may have been written into."""
    begin, end = span
    values, wrong = checked(reply["values"], end - begin)
    failures = wrong | {int(place): str(error) for place, error in reply["failures"].items()}
    extras = {str(column): list(values) for column, values in reply["extras"].items()}
    for name in reply["metrics"]:
        check_metric(name)
    metrics = {str(name): [float(value) for value in values] for name, values in reply["metrics"].items()}
    if not set(failures) <= set(range(end - begin)) or any(len(column) != end - begin for column in extras.values()):
        raise ValueError("places that are not there")
    return Answer(values, failures, extras, metrics, float(reply["seconds"]))
