"""Continuous batching: rows take a free slot, get a token a step, and leave their slot when they stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from grpo.generation.decoding import Decoding
from grpo.generation.events import Events
from grpo.generation.parking import Parking
from grpo.generation.rows import Row
from grpo.generation.sampling import Drawn
from grpo.generation.seats import Seats, blank
from grpo.types import FinishReason


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way: what it draws, and for which rows, by slot."""

    rows: list[Row | None]
    drawn: Drawn

    def launch(self) -> None:
        mx.async_eval(self.drawn.arrays())  # type: ignore[no-untyped-call]


class Run:
    """Rows on their way through the slots. All buffers are let go of when no row is left that may decode."""

    def __init__(self, find_decoding: Callable[[], Decoding], most_slots: int, parking: Parking) -> None:
        self.seats = Seats(find_decoding, most_slots, parking)
        self._live: dict[Row, None] = {}
        self._flying: _Step | None = None

    @property
    def busy(self) -> bool:
        """Whether a row decodes or waits for a slot, or a step is under way."""
        return bool(self.seats.queue or self._flying or any(self.seats.rows))

    def begin(self, row: Row) -> None:
        """Take a new row."""
        self._live[row] = None
        self.seats.enqueue(row)

    def go_on(self, row: Row) -> None:
        """Let a row that was away wait for a slot again."""
        self.seats.away -= 1
        self.seats.enqueue(row)

    def park(self, row: Row) -> None:
        """Take a row out of its slot or out of the queue. The step under way has been read."""
        if row.state == "decoding":
            self.seats.leave(row, keep=True)
        else:
            self.seats.queue.remove(row)
        row.state = "parked"
        self.seats.away += 1

    def release(self, row: Row) -> None:
        """Free what a row holds that may still decode, and everything if it is the last."""
        former, row.state = row.state, "released"
        if former == "decoding":
            self._leave(row, keep=False)
        elif former == "queued":
            self.seats.queue.remove(row)
        else:
            self.seats.away -= 1
        if former != "decoding":
            self.seats.parking.drop(row)
            self.seats.spare(row.prompt)
        del self._live[row]
        if not self._live:
            self.drain()
            self.seats.close()

    def close(self) -> None:
        """Release all rows."""
        for row in list(self._live):
            self.release(row)

    def step(self) -> Events:
        """Decode until tokens have come, which are in their rows then; no events where nothing is in flight.

        The host reads one step behind the device. Where launching over a running step would make MLX copy the buffers,
        the next step's graph is built meanwhile, and launched when the running one has been read.
        """
        events = None
        while events is None:
            if self._flying is not None and self.seats.overlaps and self.seats.will_rearrange():
                return self.drain()
            self.seats.arrange()
            step = self._next_step()
            if step is not None and self.seats.overlaps:
                step.launch()
            flying, self._flying = self._flying, step
            events = self._read(flying) if flying is not None else None
            if step is None:
                break
            if not self.seats.overlaps:
                step.launch()
        if not self._live and self._flying is None:
            self.seats.close()
        return events if events is not None else Events()

    def drain(self) -> Events:
        """Read the step under way, if there is one, and begin no other."""
        flying, self._flying = self._flying, None
        return self._read(flying) if flying is not None else Events()

    def _next_step(self) -> _Step | None:
        """The graph of one more token for every slot, or None if no slot has a row."""
        rows = self.seats.rows
        if not any(rows):
            return None
        step = _Step(list(rows), self.seats.draw())
        for row in step.rows:
            if row is not None:
                row.launched += 1
                if row.launched == row.longest:  # it ends with this token, whatever it is
                    self.seats.leave(row, keep=False)
        return step

    def _read(self, step: _Step) -> Events:
        """Hand a step's tokens to their rows, but to those that had left when it began."""
        drawn: list[Any] = [a.tolist() if a is not None else None for a in
                            (step.drawn.tokens, step.drawn.logprobs, step.drawn.sampler_logprobs)]  # fmt: skip
        tokens, logprobs, sampler_logprobs = drawn
        ended: dict[Row, FinishReason] = {}
        for slot, row in enumerate(step.rows):
            if row is None:
                continue
            row.token_ids.append(tokens[slot])
            if row.wants_logprobs:
                row.logprobs.append(logprobs[slot])
            if row.wants_sampler_logprobs:
                row.sampler_logprobs.append(sampler_logprobs[slot])
            reason = row.stopping.reason(row.token_ids)
            if reason is not None:
                row.finish_reason = ended[row] = reason
                self._end(row)
        return Events(step.rows, tokens, logprobs, sampler_logprobs, ended)

    def _end(self, row: Row) -> None:
        waits = row.keep and row.room > 0
        self._leave(row, waits)
        row.state = "waiting" if waits else "done"
        self.seats.away += waits
        if not waits:
            del self._live[row]

    def _leave(self, row: Row, keep: bool) -> None:
        if self._flying is not None:
            blank(self._flying.rows, row)
        self.seats.leave(row, keep)
