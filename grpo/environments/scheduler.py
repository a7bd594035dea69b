"""Coroutines that take turns, between two steps of the generator.

They wait for rows of the generator, for each other, and for work in other threads or processes. One loop drives all of
that, which is why there is no asyncio here: its event loop would wait for sockets and clocks while the generator waits,
and it does not run in a notebook, which has one already.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Coroutine, Generator, Iterable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from grpo.environments.mistakes import WAY_OUT, EnvironmentMistake

Result = TypeVar("Result")

GRACE, SHARE = 0.5, 0.1
"""How long rows may wait for outside work in all, so that what goes on when does not depend on the clock: so many
seconds, and this share of the time since they began. After that nobody waits any more."""


class TimeIsUpError(Exception):
    """What was awaited had not happened by then."""


class Gate:
    """Closed until something has happened. `await gate` waits for that."""

    __slots__ = ("is_open", "waiting")

    def __init__(self) -> None:
        self.is_open = False
        self.waiting: list[Job[Any]] = []

    def __await__(self) -> Generator[Gate, None, None]:
        if not self.is_open:
            yield self


class Outside(Gate):
    """Opened by another thread or process: `done` there. With `patient` nothing that decodes is held up for it."""

    __slots__ = ("done", "patient")

    def __init__(self, patient: bool = False) -> None:
        super().__init__()
        self.done, self.patient = False, patient


class Job(Generic[Result]):
    """A coroutine on its way. `await job` waits for its end, and gives its result or raises its error."""

    __slots__ = ("_result", "coroutine", "end", "error")

    def __init__(self, coroutine: Coroutine[Any, None, Result]) -> None:
        self.coroutine, self.end = coroutine, Gate()
        self.error: Exception | None = None
        self._result: Result

    def __await__(self) -> Generator[Gate, None, Result]:
        yield from self.end.__await__()
        return self.result()

    def result(self) -> Result:
        """What the coroutine returned. Raises what it raised, and EnvironmentMistake if it has not ended."""
        if self.error is not None:
            raise self.error
        if not self.end.is_open:
            raise EnvironmentMistake("it waits for a row that does not decode: extend the row first, or release it")
        return self._result

    def advance(self) -> Gate | None:
        """Run until it waits at a gate, which is returned; None at its end. An interrupt passes through."""
        try:
            gate: object = self.coroutine.send(None)
            while not isinstance(gate, Gate):
                gate = self.coroutine.throw(EnvironmentMistake(f"it awaits {gate!r:.80}: {WAY_OUT}"))
            return gate
        except StopIteration as end:
            self._result = end.value
        except Exception as error:
            self.error = error
        return None


class Scheduler:
    """Runs jobs until all of them wait; whoever drives it opens gates, and runs it again."""

    def __init__(self) -> None:
        self._ready: deque[Job[Any]] = deque()
        self._live: dict[Job[Any], bool] = {}
        self._outside: dict[Outside, None] = {}
        self._punctual, self._waited, self._began = True, 0.0, time.monotonic()
        self._posted: SimpleQueue[Outside] = SimpleQueue()
        self._alarms: list[tuple[float, int, Gate]] = []
        self._numbers = count()

    @property
    def waits_outside(self) -> bool:
        """Whether a job waits for work in another thread or process."""
        return bool(self._outside)

    def start(self, coroutine: Coroutine[Any, None, Result], awaited: bool = False) -> Job[Result]:
        """Let a coroutine begin at the next `run`, which raises what the coroutine raises unless it is `awaited`."""
        job = Job(coroutine)
        self._live[job] = awaited
        self._ready.append(job)
        return job

    def open(self, gate: Gate) -> None:
        """What those at the gate wait for has happened."""
        gate.is_open = True
        self._ready.extend(gate.waiting)
        gate.waiting.clear()

    def run(self) -> None:
        """Let all that may go on do so, in the order in which they became ready.

        Raises the error of a job that nobody awaits, at once: the others are of no use without it.
        """
        while self._ready:
            job = self._ready.popleft()
            gate = job.advance()
            if gate is None:
                awaited = self._live.pop(job)
                if job.error is not None and not awaited:
                    raise job.error
                self.open(job.end)
            else:
                gate.waiting.append(job)

    def collect(self, wait: bool = False) -> None:
        """Open the gates of outside work that is done, in the order in which it was begun; `wait` for some if none is.

        As long as work is quick, all of it is waited for, but for what is `patient`. Then rows go on at the same places
        in every run, and are decoded beside the same others, on which the last bits of their numbers depend.
        """
        alarm = min((moment for moment, _, gate in self._alarms if not gate.is_open), default=inf)
        if wait and not any(gate.done for gate in self._outside):
            self._note(alarm)  # nothing is held up meanwhile
        if self._punctual and self._awaits:
            now = time.monotonic()
            late = min(alarm, now + GRACE + SHARE * (now - self._began) - self._waited)
            while self._punctual and self._awaits:
                self._note(late)
                self._punctual = time.monotonic() < late
            self._waited += time.monotonic() - now
        while not self._posted.empty():
            self._note(0)
        for gate in [gate for gate in self._outside if gate.done]:
            del self._outside[gate]
            self.open(gate)

    @property
    def _awaits(self) -> bool:
        """Whether there is outside work that rows wait for as long as it is quick."""
        return not all(gate.done or gate.patient for gate in self._outside)

    def _note(self, until: float) -> None:
        """Note the next outside work that is done, if some is by that moment."""
        with suppress(Empty):
            self._posted.get(timeout=max(0.0, until - time.monotonic()) if until < inf else None).done = True

    def open_at(self, moment: float, gate: Gate) -> None:
        """Let `ring` open the gate at a moment of `time.monotonic`, unless it is open by then."""
        heapq.heappush(self._alarms, (moment, next(self._numbers), gate))

    def ring(self) -> None:
        """Open the gates whose moment has come."""
        while self._alarms and (self._alarms[0][2].is_open or self._alarms[0][0] <= time.monotonic()):
            gate = heapq.heappop(self._alarms)[2]
            if not gate.is_open:
                if isinstance(gate, Outside):
                    self._outside.pop(gate, None)
                self.open(gate)

    def close(self) -> None:
        """End the coroutines that have not ended: their `finally` blocks run."""
        for job in reversed(self._live):
            job.coroutine.close()
        self._live.clear()
        self._alarms.clear()
        self._ready.clear()

    async def gather(self, coroutines: Iterable[Coroutine[Any, None, Result]]) -> list[Result]:
        """Run all of them side by side. Returns their results in order; raises the first error in that order."""
        jobs = [self.start(coroutine, awaited=True) for coroutine in coroutines]
        return [await job for job in jobs]

    async def outside(self, future: Future[Result], until: float | None = None) -> Result:
        """The result of work in another thread or process.

        Raises TimeIsUpError if there is none at the moment `until` of `time.monotonic`; the work goes on unwatched.
        """
        gate = self.expect(Outside())
        future.add_done_callback(lambda _: self.happened(gate))
        if until is not None:
            self.open_at(until, gate)
        await gate
        if not future.done():
            raise TimeIsUpError
        return future.result()

    def expect(self, gate: Outside) -> Outside:
        """Let `collect` open the gate once it has `happened`."""
        self._outside[gate] = None
        return gate

    def happened(self, gate: Outside) -> None:
        """Say so, from any thread."""
        self._posted.put(gate)
