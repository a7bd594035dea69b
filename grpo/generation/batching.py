"""Continuous batching: a row takes a free slot, gets one token a step, and leaves its slot when it ends."""

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
    """A step that the device computes: its draws, and the row of each slot. A row that left is None."""

    rows: list[Row | None]
    drawn: Drawn

    def launch(self) -> None:
        mx.async_eval(self.drawn.arrays())  # type: ignore[no-untyped-call]


class Run:
    """Moves rows through the slots and reads their tokens. Frees all buffers once no row can decode any more.

    One step is computed on the device (`_flying`) while the host prepares the next.
    """

    def __init__(self, find_decoding: Callable[[], Decoding], most_slots: int, parking: Parking) -> None:
        self.seats = Seats(find_decoding, most_slots, parking)
        self._live: dict[Row, None] = {}
        self._flying: _Step | None = None

    @property
    def busy(self) -> bool:
        """Whether a row decodes or is queued, or a step has not been read yet."""
        return bool(self.seats.queue or self._flying or any(self.seats.rows))

    def begin(self, row: Row) -> None:
        """Queue a new row."""
        self._live[row] = None
        self.seats.enqueue(row)

    def go_on(self, row: Row) -> None:
        """Queue a row that was waiting or parked."""
        self.seats.away -= 1
        self.seats.enqueue(row)

    def park(self, row: Row) -> None:
        """Take a row out of its slot or the queue. Call `drain` first if the row decodes."""
        if row.state == "decoding":
            self.seats.leave(row, keep=True)
        else:
            self.seats.queue.remove(row)
        row.state = "parked"
        self.seats.away += 1

    def release(self, row: Row) -> None:
        """Free a row that is not done; with the last of them, free all buffers."""
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
        """Decode until one step has been read: its tokens are in their rows, and in the events. No events if idle.

        The host reads one step behind the device. If the session `overlaps`, the next step is launched before the
        running one has been read. Otherwise a second step in flight would make MLX copy the buffers, so the host only
        builds its graph, and launches it after the read.
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
        """Read the step in flight, if there is one, without launching another."""
        flying, self._flying = self._flying, None
        return self._read(flying) if flying is not None else Events()

    def _next_step(self) -> _Step | None:
        """Build the graph that draws one more token for every slot. None if no slot has a row."""
        rows = self.seats.rows
        if not any(rows):
            return None
        step = _Step(list(rows), self.seats.draw())
        for row in step.rows:
            if row is not None:
                row.launched += 1
                if row.launched == row.longest:  # this token is its last, whatever it is
                    self.seats.leave(row, keep=False)
        return step

    def _read(self, step: _Step) -> Events:
        """Wait for a step, append its tokens to their rows, and end the rows that stop here."""
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
