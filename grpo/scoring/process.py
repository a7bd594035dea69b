"""A reward function in a worker process: started, called, killed when it hangs, replaced when it dies.

Each worker has a keeper process. The keeper notices when the trainer ends, even by SIGKILL, and kills the worker
together with every process that the function has started.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from grpo.errors import UserError
from grpo.plugins import Located
from grpo.processes.channel import receive, send
from grpo.processes.child import ChildProcess
from grpo.processes.endings import ended, killed
from grpo.processes.output import Output
from grpo.processes.variables import environment, named_variables, with_hint
from grpo.scoring.contract import Answer, checked
from grpo.scoring.forms import Form
from grpo.scoring.names import check_metric

SCRIPT = Path(__file__).parent / "worker.py"
START_SECONDS = 120.0
"""Time limit for a start, in seconds: a function's file may import large libraries."""
DEATHS = 3
"""Number of consecutive calls that may end a worker; after them the rest of the request is skipped."""

_NOISE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""Exceptions from a worker that has died, and from a malformed reply: user code may have written to the socket."""

Span = tuple[int, int]
"""The completions of a call: `(begin, end)`, end excluded."""


@dataclass(frozen=True, slots=True)
class WorkerTerms:
    """How to run a worker: seconds per call, the form of its completions, the environment variables that it may read,
    and its memory limit in GiB.

    `system` is the system message before text prompts.
    """

    timeout: float
    form: Form | None = None
    system: str | None = None
    env: tuple[str, ...] = ()
    memory_gb: float | None = None


class Worker:
    """One reward function in its own process. Not thread-safe."""

    def __init__(
        self, located: Located, kwargs: Mapping[str, Any] | None, terms: WorkerTerms, cases: str | None = None
    ) -> None:
        """Start the process without waiting for it. Raises UserError for an unset variable of `terms.env`.

        Without `kwargs`, the worker only reads the cases for tests: from the function's file, or from the file `cases`.
        """
        self.name, self.timeout = located.name, terms.timeout
        self.calls, self.paid, self.takes_environments = "step", False, False
        self.cases: list[dict[str, Any]] = []
        self.case_kwargs: dict[str, Any] = {}
        self._output = Output(located.name)
        self._closed = False
        weakref.finalize(self, self._output.close, 0.0)
        fields = tuple(getattr(located, name) for name in located.__slots__)
        reading = {"form": terms.form, "system": terms.system}
        self._setup = pickle.dumps(
            {"path": sys.path, "located": fields, "kwargs": kwargs, "reading": reading, "cases": cases}
        )
        try:
            self._environment = environment(named_variables(terms.env, located.where, kwargs or {}))
        except UserError as error:
            raise UserError(f"reward {self.name!r}: {error}") from None
        self._memory_gb = terms.memory_gb
        self._ready = False
        self._start()

    def close(self) -> None:
        """Kill the process and its children. A `score` that is running in another thread ends."""
        self._closed = True
        self._process.kill()
        self._output.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self) -> None:
        """Begin a scoring: the limit on shown output starts again."""
        self._output.begin()

    def wait_ready(self) -> None:
        """Wait until the function is imported. Raises UserError, with the reason, if the import fails."""
        if self._ready:
            return
        try:
            hello = self._receive(START_SECONDS)
        except _NOISE as error:
            raise UserError(f"reward {self.name!r}: {self._died(error, START_SECONDS, 'when imported')}") from None
        if "error" in hello:
            said = with_hint(hello["error"], self._environment)
            raise UserError(said if said.startswith("reward ") else f"reward {self.name!r}: {said}")
        self.calls, self.paid, self._ready = hello["calls"], hello["paid"], True
        self.takes_environments = hello["environments"]
        self.cases, self.case_kwargs = hello.get("cases", []), hello.get("case_kwargs", {})

    def problem(self, columns: Collection[str]) -> str | None:
        """Why the function cannot be called with these columns of the dataset; None if it can."""
        self.wait_ready()
        try:
            send(self._process.channel, pickle.dumps({"check": list(columns)}), START_SECONDS)
            problem: str | None = self._receive(START_SECONDS)["problem"]
        except _NOISE as error:
            return self._died(error, START_SECONDS, "before it was called")
        return problem

    def score(self, columns: bytes, spans: Sequence[Span], state: Mapping[str, Any]) -> Iterator[Answer]:
        """Yield one answer per span of the pickled columns.

        If a call exceeds the time limit or ends the process, its span is a failure, and a new process continues with
        the next span.
        """
        done = deaths = 0
        began = time.perf_counter()
        while done < len(spans):
            try:
                self.wait_ready()
                request = {"columns": columns, "spans": spans[done:], "state": dict(state)}
                send(self._process.channel, pickle.dumps(request), self.timeout)
                for _ in range(done, len(spans)):
                    yield self._hinted(answer_of(self._receive(self.timeout), spans[done]))
                    done, deaths, began = done + 1, 0, time.perf_counter()
            except UserError as error:  # a replacement cannot import the function again
                yield from (Answer.failed(end - begin, str(error)) for begin, end in spans[done:])
                return
            except _NOISE as error:
                if self._closed:
                    return
                begin, end = spans[done]
                kind: Literal["error", "timeout"] = "timeout" if isinstance(error, TimeoutError) else "error"
                said = self._died(error, self.timeout, "in this call")
                yield replace(Answer.failed(end - begin, said, kind, time.perf_counter() - began), fatal=True)
                self._replace()
                began = time.perf_counter()
                done, deaths = done + 1, deaths + 1
                if deaths == DEATHS:
                    yield from map(untried, spans[done:])
                    return

    def _hinted(self, answer: Answer) -> Answer:
        hinted = {place: with_hint(error, self._environment) for place, error in answer.failures.items()}
        return replace(answer, failures=hinted)

    def _died(self, error: Exception, seconds: float, when: str) -> str:
        """Kill the rest of the process, and describe how it ended."""
        if isinstance(error, TimeoutError):
            return killed(self._process, seconds, when)
        return ended(self._process, self._output, error, when, self._memory_gb)[1]

    def _replace(self) -> None:
        self._process.kill()
        self._start()

    def _start(self) -> None:
        self._ready = False
        self._process = ChildProcess(SCRIPT, self._output, self._environment, self._memory_gb)
        with contextlib.suppress(OSError):  # the process has already died: `wait_ready` reports it
            send(self._process.channel, self._setup, START_SECONDS)

    def _receive(self, seconds: float) -> Any:
        return json.loads(receive(self._process.channel, seconds))


def untried(span: Span) -> Answer:
    """The answer of a call that is skipped because the calls before it ended their process."""
    begin, end = span
    return Answer.failed(end - begin, f"not called: each of the {DEATHS} calls before this one ended its process")


def answer_of(reply: Any, span: Span) -> Answer:
    """A worker's reply as an answer. User code may have written anything into the reply: raises one of `_NOISE` for
    an invalid reply."""
    begin, end = span
    values, wrong = checked(reply["values"], end - begin)
    failures = wrong | {int(place): str(error) for place, error in reply["failures"].items()}
    extras = {str(column): list(values) for column, values in reply["extras"].items()}
    for name in reply["metrics"]:
        check_metric(name)
    metrics = {str(name): [float(value) for value in values] for name, values in reply["metrics"].items()}
    if not set(failures) <= set(range(end - begin)) or any(len(column) != end - begin for column in extras.values()):
        raise ValueError("indices of completions that do not exist")
    return Answer(values, failures, extras, metrics, float(reply["seconds"]))
