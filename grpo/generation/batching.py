"""Continuous batching: a row enters a free slot, gets one or more tokens per step, and leaves its slot when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from grpo.generation.decoding import Decoding
from grpo.generation.events import Events
from grpo.generation.parking import Parking
from grpo.generation.rows import Row
from grpo.generation.sampling import Drawn
from grpo.generation.seats import Seats, blank
from grpo.generation.slots import WIDEST
from grpo.generation.speculation import Speculation
from grpo.types import FinishReason


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that the device computes: the tokens that it draws, and the row of each slot; None if the row has left.

    A plain step feeds each slot its last token, and `fed` is None. A wide step feeds several tokens per slot, of which
    all but the first are drafts: a token drawn after a draft counts only if all drafts up to there were drawn.
    """

    rows: list[Row | None]
    drawn: Drawn
    began: float
    fed: list[list[int]] | None = None

    @property
    def width(self) -> int:
        return len(self.fed[0]) if self.fed else 1

    def launch(self) -> None:
        mx.async_eval(self.drawn.arrays())  # type: ignore[no-untyped-call]


class Run:
    """Moves rows through the slots and reads their tokens. Frees all buffers once no row can decode any more.

    The device computes one step (`_flying`) while the host prepares the next. The drafts of a wide step depend on the
    tokens before it, so the host prepares a wide step only after it has read the previous step.
    """

    def __init__(
        self,
        find_decoding: Callable[[], Decoding],
        most_slots: int,
        parking: Parking,
        speculation: Speculation | None = None,
    ) -> None:
        self._speculation = speculation
        self.seats = Seats(find_decoding, most_slots, parking, ahead=WIDEST - 1 if speculation else 0)
        self._read_at = 0.0
        self._live: dict[Row, None] = {}
        self._flying: _Step | None = None

    @property
    def busy(self) -> bool:
        """Whether a row is decoding or queued, or a step has not been read yet."""
        return bool(self.seats.queue or self._flying or any(self.seats.rows))

    @property
    def load(self) -> int:
        """The number of rows that are decoding or queued."""
        return len(self.seats.queue) + sum(row is not None for row in self.seats.rows)

    def begin(self, row: Row) -> None:
        """Queue a new row."""
        self._live[row] = None
        self.seats.enqueue(row)

    def resume(self, row: Row) -> None:
        """Queue a row that was waiting or parked."""
        self.seats.away -= 1
        self.seats.enqueue(row)

    def park(self, row: Row) -> None:
        """Take a row out of its slot or the queue. If the row is decoding, call `drain` first."""
        if row.state == "decoding":
            self.seats.leave(row, keep=True)
        else:
            self.seats.queue.remove(row)
        row.state = "parked"
        self.seats.away += 1

    def release(self, row: Row) -> None:
        """Free a row that is not done. Freeing the last row also frees all buffers."""
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

    @property
    def lockstep(self) -> bool:
        """See `Decoding.lockstep`."""
        return self.seats.lockstep

    def close(self) -> None:
        """Release all rows."""
        for row in list(self._live):
            self.release(row)

    def abandon(self) -> None:
        """Release all rows in whatever state they are, and free all buffers, without reading the step in flight."""
        self._flying = None
        for row in self._live:
            row.state = "released"
        self._live.clear()
        self.seats.abandon()

    def step(self) -> Events:
        """Decode until one step has been read, and return its tokens as events; they are also appended to their rows.

        Returns empty events if there is nothing to decode. The host reads one step behind the device. If the session
        `overlaps`, the host launches the next step before it reads the running step. Otherwise a second step in flight
        would make MLX copy the buffers, so the host only builds the graph and launches it after the read. The host
        reads the step in flight before it prepares a wide step, and reads a wide step before it prepares the next step.
        """
        events = None
        while events is None:
            if self._flying is not None and self._flying.width > 1:
                events = self.drain()
            elif self._flying is not None and self.seats.overlaps and self.seats.will_rearrange():
                events = self.drain()
                break
            width = self._next_width()
            if width > 1 and self._flying is not None:
                events = self.drain()
            self.seats.arrange()
            step = self._next_step(width)
            flying, self._flying = self._flying, step
            at_once = flying is None or self.seats.overlaps
            if step is not None and at_once:
                step.launch()
            if flying is not None:
                events = self._read(flying)
            if step is None:
                break
            if not at_once:
                step.launch()
        if not self._live and self._flying is None:
            self.seats.close()
        return events if events is not None else Events()

    def drain(self) -> Events:
        """Read the step in flight, if there is one, without launching another step."""
        flying, self._flying = self._flying, None
        return self._read(flying) if flying is not None else Events()

    def _next_width(self) -> int:
        """The number of tokens that the next step should feed each row."""
        if self._speculation is None or self.seats.widest == 1 or not any(self.seats.rows):
            return 1
        return min(self._speculation.width(self.seats.rows), self.seats.widest)

    def _next_step(self, width: int) -> _Step | None:
        """Build the graph that draws the next token or tokens for every slot. None if no slot has a row."""
        rows, began = self.seats.rows, time.perf_counter()
        if not any(rows):
            return None
        if fed := self._fed(width):
            return _Step(list(rows), self.seats.draw_wide(fed), began, fed)
        step = _Step(list(rows), self.seats.draw(), began)
        for row in step.rows:
            if row is not None:
                row.launched += 1
                if row.launched == row.longest:  # the row ends with this token, whatever the token is
                    self.seats.leave(row, keep=False)
        return step

    def _fed(self, width: int) -> list[list[int]]:
        """The tokens that a wide step feeds each slot: its last token, then drafts. Empty if there are no drafts."""
        if self._speculation is None or width == 1:
            return []
        rows = self.seats.rows
        drafts = self._speculation.propose(rows, width)
        while width > 1 and 1 + max(map(len, drafts)) <= width // 2:  # no wider than the drafts need
            width //= 2
        if width == 1:
            return []
        lasts = [row.last if row is not None else 0 for row in rows]
        fed = [[last, *draft[: width - 1]] for last, draft in zip(lasts, drafts, strict=True)]
        return [[*ids, *[ids[-1]] * (width - len(ids))] for ids in fed]

    def _read(self, step: _Step) -> Events:
        """Wait for a step, append its tokens to their rows, and end the rows that stop at this step."""
        drawn = step.drawn
        arrays = (drawn.tokens, drawn.logprobs, drawn.sampler_logprobs)
        tokens, logprobs, filtered = (_by_slot(array, step.width) for array in arrays)
        ended: dict[Row, FinishReason] = {}
        for slot, row in enumerate(step.rows):
            if row is None:
                tokens[slot] = []
                continue
            taken, reason = _follow(row, tokens[slot], step.fed[slot] if step.fed else ())
            for column in filter(None, (tokens, logprobs, filtered)):
                del column[slot][taken:]
            if row.wants_logprobs:
                row.logprobs += logprobs[slot]
            if row.wants_sampler_logprobs:
                row.sampler_logprobs += filtered[slot]
            if reason is not None:
                row.finish_reason = ended[row] = reason
        if step.fed:
            self.seats.take(tokens)
        self._report(step, tokens, ended)
        for row in ended:
            self._end(row)
        return Events(step.rows, tokens, logprobs or None, filtered or None, ended)

    def _report(self, step: _Step, tokens: Sequence[Sequence[int]], ended: Iterable[Row]) -> None:
        """Pass the step's time and accepted tokens on to the speculation."""
        if self._speculation is None:
            return
        now = time.perf_counter()
        spent, self._read_at = now - max(step.began, self._read_at), now
        self._speculation.stepped(step.rows, step.width, list(map(len, tokens)), spent)
        for row in ended:
            self._speculation.ended(row)

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


def _follow(row: Row, drawn: Sequence[int], fed: Sequence[int]) -> tuple[int, FinishReason | None]:
    """Append drawn tokens to a row until the row ends, or the next draft differs from the token that was drawn.

    Returns the number of tokens appended, and the reason why the row ends with the last of them, or None.
    """
    for taken, token in enumerate(drawn, start=1):
        row.token_ids.append(token)
        reason = row.stopping.reason(row.token_ids)
        if reason is not None or taken == len(drawn) or fed[taken] != token:
            break
    if fed:
        row.launched = len(row.token_ids)
    return taken, reason


def _by_slot(array: mx.array | None, width: int) -> list[list[Any]]:
    """`[S · W]` as a list of W values per slot; empty if there is no array."""
    values = [] if array is None else cast(list[Any], array.tolist())
    return [values[start : start + width] for start in range(0, len(values), width)]
