"""Continuous batching: rows wait in a queue, take a free slot, and leave it when they stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from grpo.generation.decoding import Decoding, Session
from grpo.generation.events import Events
from grpo.generation.parking import Parking
from grpo.generation.rows import Prompt, Row
from grpo.generation.samplers import Samplers
from grpo.generation.sampling import Drawn
from grpo.generation.slots import Size
from grpo.types import FinishReason


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way: what it draws, and for which rows, by slot."""

    rows: list[Row | None]
    drawn: Drawn

    def launch(self) -> None:
        mx.async_eval(self.drawn.arrays())  # type: ignore[no-untyped-call]


class Run:
    """Rows on their way through at most `most_slots` slots.

    Buffers are opened as the first rows come, grow with the rows in flight, and are let go of when no row is left that
    may decode. `live` counts those rows, `away` the ones among them that are out of their slots and not in the queue.
    """

    def __init__(self, find_decoding: Callable[[], Decoding], most_slots: int, parking: Parking) -> None:
        self._find_decoding, self._most_slots, self.parking = find_decoding, most_slots, parking
        self.queue: deque[Row] = deque()
        self.live = self.away = 0
        self._active: list[Row | None] = []
        self._leaving: list[tuple[int, Row]] = []
        self._flying: _Step | None = None
        self._unfit = False  # rows have come that the buffers were not made to fit
        self._opened: Decoding | None = None
        self._session: Session
        self._samplers: Samplers
        self._tokens: mx.array
        self._logprobs = False

    @property
    def busy(self) -> bool:
        """Whether a row decodes or waits for a slot, or a step is under way."""
        return bool(self.queue or self._flying or any(self._active))

    @property
    def slots(self) -> int:
        """How many slots the rows in flight take at most."""
        return max(len(self._active), min(self._most_slots, len(self.queue)))

    def enqueue(self, row: Row) -> None:
        """Let a row wait for a slot: before those that have not begun if it goes on."""
        fresh = next((i for i, other in enumerate(self.queue) if not other.token_ids), len(self.queue))
        self.queue.insert(fresh if row.token_ids else len(self.queue), row)
        row.state, self._unfit = "queued", True

    def step(self) -> Events:
        """Decode until tokens have come, which are in their rows then; no events where nothing is in flight.

        The host reads one step behind the device. Where launching over a running step would make MLX copy the buffers,
        the next step's graph is built meanwhile, and launched when the running one has been read.
        """
        events = None
        while events is None:
            if self._flying is not None and self._session.overlaps and self._will_rearrange():
                return self.drain()
            self._arrange()
            step = self._next_step()
            if step is not None and self._session.overlaps:
                step.launch()
            flying, self._flying = self._flying, step
            events = self._read(flying) if flying is not None else None
            if step is None:
                break
            if not self._session.overlaps:
                step.launch()
        if not self.live and self._flying is None:
            self.close()
        return events if events is not None else Events()

    def drain(self) -> Events:
        """Read the step under way, if there is one, and begin no other."""
        flying, self._flying = self._flying, None
        return self._read(flying) if flying is not None else Events()

    def release(self, row: Row) -> None:
        """Free what a row holds that may still decode, and everything if it is the last."""
        former, row.state = row.state, "released"
        if former == "decoding":
            self.leave(row, keep=False)
        else:
            if former == "queued":
                self.queue.remove(row)
            self.away -= former != "queued"
            self.parking.drop(row)
            self.spare(row.prompt)
        self.live -= 1
        if not self.live:
            self.drain()
            self.close()

    def leave(self, row: Row, keep: bool) -> None:
        """Take a row out of its slot. With `keep`, what it needs to go on is taken out before anything else moves."""
        if self._flying is not None:
            _blank(self._flying.rows, row)
        if (slot := _blank(self._active, row)) is None:
            return  # it has left with its last step
        if keep:
            self._leaving.append((slot, row))
        else:
            self._session.release(slot)
            self.spare(row.prompt)

    def spare(self, prompt: Prompt) -> None:
        """A row of this prompt will not decode any more."""
        prompt.left -= 1
        if not prompt.left and self._opened is not None:
            self._session.forget(prompt)

    def close(self) -> None:
        """Let go of all buffers."""
        if self._opened is not None:
            self._opened.forget()
            del self._session, self._samplers, self._tokens
        self._active, self._leaving, self._flying, self._opened = [], [], None, None

    def _free(self) -> list[int]:
        return [slot for slot, row in enumerate(self._active) if row is None]

    def _is_tail(self, free: Sequence[int]) -> bool:
        """Whether so many slots are empty for good that the others had better go on alone."""
        waiting = self.queue or self.away
        return not waiting and len(self._active) > len(free) >= (len(self._active) + 1) // 2

    def _will_rearrange(self) -> bool:
        """Whether buffers are about to be changed that a step in flight may read."""
        if self._leaving or (self.queue and self._unfit):
            return True
        free = self._free()
        entering = [self.queue[i] for i in range(min(len(free), len(self.queue)))]
        return self._is_tail(free) or self._session.needs_prefill(entering)

    def _arrange(self) -> None:
        """Let waiting rows into free slots; where none wait and most slots are free, drop those."""
        self._take_out()
        if self.queue and not any(self._active):
            self._begin()
        if self.queue and self._unfit:
            self._fit()
        free = self._free()
        if entering := [(slot, self.queue.popleft()) for slot in free[: len(self.queue)]]:
            self._admit(entering)
        elif self._is_tail(free):
            self._shrink()

    def _take_out(self) -> None:
        for slot, row in self._leaving:
            if row.state != "released":
                self.parking.put(row, self._session.take(slot))
            self._session.release(slot)
        self._leaving.clear()

    def _begin(self) -> None:
        """Open the buffers, or take over what has become of the model since the last row left its slot."""
        decoding = self._find_decoding()
        if decoding is self._opened:
            self._session.refresh()
            return
        self.parking.clear()  # it is of no use to another way of decoding
        size = self._size()
        self._opened, self._session = decoding, decoding.open(size)
        self._samplers = Samplers(size.slots, decoding.vocabulary)
        self._tokens = mx.zeros(size.slots, mx.uint32)
        self._active, self._unfit = [None] * size.slots, False

    def _size(self) -> Size:
        """What the rows in slots and in the queue take."""
        rows = [row for row in (*self._active, *self.queue) if row is not None]
        slots, prompts = min(self._most_slots, len(rows)), dict.fromkeys(row.prompt for row in rows)
        prefix = max(len(prompt.ids) for prompt in prompts) - 1
        return Size(slots, min(len(prompts), slots), prefix, max(row.longest for row in rows))

    def _fit(self) -> None:
        size, self._unfit = self._size(), False
        self._session.fit(size)
        more = size.slots - len(self._active)
        if more > 0:
            self._samplers.grow(size.slots)
            self._tokens = mx.pad(self._tokens, (0, more))
            self._active += [None] * more

    def _admit(self, entering: Sequence[tuple[int, Row]]) -> None:
        slots, rows = [slot for slot, _ in entering], [row for _, row in entering]
        self._session.admit(slots, rows)
        first = mx.array([row.last for row in rows], mx.uint32)
        # Not `self._tokens[...] = first`: a step that has not been read holds the same object.
        self._tokens = mx.put_along_axis(self._tokens, mx.array(slots), first, axis=0)
        for slot, row in entering:
            self.parking.drop(row)
            row.state, row.launched = "decoding", len(row.token_ids)
            self._active[slot] = row
        self._samplers.seat(entering, self._active)
        self._logprobs = any(row.wants_logprobs for row in self._active if row is not None)

    def _shrink(self) -> None:
        kept = [slot for slot, row in enumerate(self._active) if row is not None]
        self._session.keep(kept)
        self._samplers.keep(kept)
        self._tokens = self._tokens[mx.array(kept)]
        self._active = [self._active[slot] for slot in kept]

    def _next_step(self) -> _Step | None:
        """The graph of one more token for every slot, or None if no slot has a row."""
        if not any(self._active):
            return None
        decoded = self._session.decoded()
        drawn = self._samplers.draw(self._session.logits(self._tokens), decoded, self._logprobs)
        self._tokens = drawn.tokens
        step = _Step(list(self._active), drawn)
        for slot, row in enumerate(self._active):
            if row is not None:
                row.launched += 1
                if row.launched == row.longest:  # it ends with this token, whatever it is
                    self._active[slot] = None
                    self._session.release(slot)
                    self.spare(row.prompt)
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
        self.leave(row, waits)
        row.state = "waiting" if waits else "done"
        self.away += waits
        self.live -= not waits


def _blank(rows: list[Row | None], row: Row) -> int | None:
    """Let none be in a row's place, which is returned if it has one."""
    slot = next((slot for slot, other in enumerate(rows) if other is row), None)
    if slot is not None:
        rows[slot] = None
    return slot
