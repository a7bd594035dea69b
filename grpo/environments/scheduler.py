"""A scheduler for coroutines that run between two steps of the generator.

They wait for rows of the generator, for each other, and for work in other threads or processes. One loop drives all of
this instead of asyncio: an asyncio loop would wait for sockets and clocks while the generator waits, and it could not
run in a notebook, which already runs an asyncio loop.
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
"""Total time that decoding may pause for outside work, so that the order of events does not depend on the clock: GRACE
seconds plus this share of the elapsed time. After that, decoding no longer pauses."""


class TimeIsUpError(Exception):
    """The deadline passed before the awaited event."""


class Gate:
    """An event. `await gate` waits until the gate is open."""

    __slots__ = ("is_open", "waiting")

    def __init__(self) -> None:
        self.is_open = False
        self.waiting: list[Job[Any]] = []

    def __await__(self) -> Generator[Gate, None, None]:
        if not self.is_open:
            yield self


class Outside(Gate):
    """A gate for work in another thread or process. `done`: the work is done. `patient`: decoding does not pause."""

    __slots__ = ("done", "patient")

    def __init__(self, patient: bool = False) -> None:
        super().__init__()
        self.done, self.patient = False, patient


class Job(Generic[Result]):
    """A running coroutine. `await job` waits for its end, and returns its result or raises its error."""

    __slots__ = ("_result", "coroutine", "end", "error")

    def __init__(self, coroutine: Coroutine[Any, None, Result]) -> None:
        self.coroutine, self.end = coroutine, Gate()
        self.error: Exception | None = None
        self._result: Result

    def __await__(self) -> Generator[Gate, None, Result]:
        yield from self.end.__await__()
        return self.result()

    def result(self) -> Result:
        """Return the coroutine's result. Raises what it raised, and EnvironmentMistake if it has not ended."""
        if self.error is not None:
            raise self.error
        if not self.end.is_open:
            raise EnvironmentMistake("it waits for a row that does not decode: extend the row first, or release it")
        return self._result

    def advance(self) -> Gate | None:
        """Run the coroutine until it waits at a gate, and return the gate; None at its end. Interrupts propagate."""
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
    """Runs jobs until all of them wait. The caller opens gates and runs the scheduler again."""

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
        """Start a coroutine at the next `run`, which raises what the coroutine raises unless it is `awaited`."""
        job = Job(coroutine)
        self._live[job] = awaited
        self._ready.append(job)
        return job

    def open(self, gate: Gate) -> None:
        """Open a gate: its event has happened, and the jobs that wait at it become ready."""
        gate.is_open = True
        self._ready.extend(gate.waiting)
        gate.waiting.clear()

    def run(self) -> None:
        """Run all ready jobs, in the order in which they became ready.

        If a job that is not awaited fails, its error is raised immediately: the other jobs are useless without it.
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
        """Open the gates of outside work that is done, in the order in which the work began.

        With `wait`, block until some work is done. As long as outside work is quick, decoding waits for all of it,
        except for `patient` gates. Rows then resume at the same steps in every run, and are decoded in the same
        batches, on which the last bits of their numbers depend.
        """
        alarm = min((moment for moment, _, gate in self._alarms if not gate.is_open), default=inf)
        if wait and not any(gate.done for gate in self._outside):
            self._note(alarm)  # no row is decoding, so this does not count as a pause
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
        """Whether there is unfinished outside work for which decoding may pause."""
        return not all(gate.done or gate.patient for gate in self._outside)

    def _note(self, until: float) -> None:
        """Mark the next finished outside work as done, waiting for it at most until `until`."""
        with suppress(Empty):
            self._posted.get(timeout=max(0.0, until - time.monotonic()) if until < inf else None).done = True

    def open_at(self, moment: float, gate: Gate) -> None:
        """Make `ring` open the gate at `moment` (clock: `time.monotonic`), unless it is open by then."""
        heapq.heappush(self._alarms, (moment, next(self._numbers), gate))

    def ring(self) -> None:
        """Open the gates whose deadline has passed."""
        while self._alarms and (self._alarms[0][2].is_open or self._alarms[0][0] <= time.monotonic()):
            gate = heapq.heappop(self._alarms)[2]
            if not gate.is_open:
                if isinstance(gate, Outside):
                    self._outside.pop(gate, None)
                self.open(gate)

    def close(self) -> None:
        """Close the coroutines that have not ended; their `finally` blocks run."""
        for job in reversed(self._live):
            job.coroutine.close()
        self._live.clear()
        self._alarms.clear()
        self._ready.clear()

    async def gather(self, coroutines: Iterable[Coroutine[Any, None, Result]]) -> list[Result]:
        """Run coroutines concurrently. Returns their results in order; raises the first error in that order."""
        jobs = [self.start(coroutine, awaited=True) for coroutine in coroutines]
        return [await job for job in jobs]

    async def outside(self, future: Future[Result], until: float | None = None) -> Result:
        """Wait for the result of work in another thread or process.

        Raises TimeIsUpError if there is no result at `until` (clock: `time.monotonic`); the work itself continues.
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
        """Make `collect` open the gate once `happened` was called for it."""
        self._outside[gate] = None
        return gate

    def happened(self, gate: Outside) -> None:
        """Report that the gate's outside work is done, from any thread."""
        self._posted.put(gate)
