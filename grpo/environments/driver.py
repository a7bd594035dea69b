"""The loop that drives the generator and the coroutines that wait for its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from grpo.environments.scheduler import Gate, Scheduler
from grpo.generation.engine import Engine
from grpo.generation.events import Events
from grpo.generation.rows import Row
from grpo.generation.sampling import Sampling
from grpo.types import FinishReason

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper


class Driver:
    """The rollouts in progress on one engine. Leaving its `with` block ends all coroutines and releases all rows."""

    def __init__(self, engine: Engine, tokenizer: TokenizerWrapper, sampling: Sampling, logprobs: bool = True) -> None:
        """`sampling` holds for every row that sets nothing else. Rows get logprobs if `logprobs` is true."""
        self.engine, self.jobs = engine, Scheduler()
        self.tokenizer, self.sampling, self.logprobs = tokenizer, sampling, logprobs
        self._ends: dict[Row, Gate] = {}
        self._watched: dict[Row, Callable[[Row], object]] = {}

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.jobs.close()
        if error is None:
            self.engine.close()
        else:
            self.engine.abandon()

    async def ended(self, row: Row, until: float | None = None) -> FinishReason:
        """Wait until a row's turn has ended, and return why it ended. Returns immediately if it has ended already.

        `until` is a deadline on the clock of `time.monotonic`. A row that still decodes or waits for a slot then is
        released, with the reason `rollout_timeout`.
        """
        if row.finish_reason is None:
            gate = self._ends.setdefault(row, Gate())
            if until is not None:
                self.jobs.open_at(until, gate)
            await gate
        if row.finish_reason is None:
            self._ends.pop(row, None)
            self.engine.release(row)
            row.finish_reason = "rollout_timeout"
        return row.finish_reason

    def watch(self, row: Row, told: Callable[[Row], object]) -> None:
        """Call `told(row)` after each step in which the row got tokens, until its turn has ended."""
        self._watched[row] = told

    def give_up(self, row: Row) -> None:
        """Release a watched row in any state, and stop watching it."""
        self._watched.pop(row, None)
        self.engine.release(row)

    def run(self, step_done: Callable[[], object], begin: Callable[[bool], bool] = lambda _: False) -> None:
        """Decode, and resume waiting coroutines whenever a row ends, until nothing is left to do.

        `step_done` is called after each step. `begin` is called before each step: it may start jobs, and returns
        whether it did. Its argument says whether it may wait for a job to start, because no row is decoding. In steps
        in which no row ends, the loop itself costs less than a microsecond.
        """
        engine, jobs, ends = self.engine, self.jobs, self._ends
        while True:
            jobs.run()
            if begun := begin(not engine.busy):
                jobs.run()
            if engine.busy:
                events = engine.step()
                for row in events.ended:
                    if (gate := ends.pop(row, None)) is not None:
                        jobs.open(gate)
                if self._watched:
                    self._tell(events)
                step_done()
            elif jobs.waits_outside:
                jobs.collect(wait=True)
            elif not begun:
                return
            jobs.collect()
            jobs.ring()

    def _tell(self, events: Events) -> None:
        """Call the callbacks of the watched rows that got tokens."""
        for row in events.rows:
            if row is not None and (told := self._watched.get(row)) is not None:
                if row in events.ended:
                    del self._watched[row]
                told(row)
