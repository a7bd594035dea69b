"""Assigns rows to slots, and keeps the queue of rows that wait for a slot."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import mlx.core as mx

from grpo.generation.decoding import Decoding, Session
from grpo.generation.growth import columns_for
from grpo.generation.parking import Parking
from grpo.generation.rows import Row, SharedPrompt
from grpo.generation.samplers import Samplers
from grpo.generation.sampling import Drawn
from grpo.generation.slots import Size


class Seats:
    """At most `most_slots` slots, with the buffers and samplers behind them.

    Buffers are opened when the first rows enter, and grow with the rows in flight: in slots as rows arrive, in columns
    as the longest row grows. `rows` has the row of each slot, or None. `away` counts the rows that may come back: slots
    are not dropped while there are any.

    A row that needs prefill stalls the rows that decode. If the device works ahead of the host (`Session.overlaps`),
    such a stall costs many steps, so rows enter together: when their total waiting time reaches the total time for
    which they would stall the decoding rows.
    """

    def __init__(
        self, find_decoding: Callable[[], Decoding], most_slots: int, parking: Parking, ahead: int = 0
    ) -> None:
        """`ahead`: the largest number of drafts that a step may feed after a row's last token."""
        self._ahead = ahead
        self._find_decoding, self._most_slots, self.parking = find_decoding, most_slots, parking
        self.rows: list[Row | None] = []
        self.queue: deque[Row] = deque()
        self.away = 0
        self._leaving: list[tuple[int, Row, int, bool]] = []
        self._stall = 0.0  # seconds that rows recently took to enter: a moving average
        self._holding: bool | None = None  # whether the queue waits at this step; None: not yet decided
        self._unfit = False  # whether the buffers have not yet been fitted to new rows
        self._columns = 0  # the number of columns per slot
        self._opened: Decoding | None = None
        self._session: Session
        self._samplers: Samplers
        self._tokens: mx.array
        self._logprobs = False

    @property
    def count(self) -> int:
        """The number of slots, counting those that will be opened for the queue."""
        return max(len(self.rows), min(self._most_slots, len(self.queue)))

    @property
    def overlaps(self) -> bool:
        """See `Session.overlaps`."""
        return self._opened is not None and self._session.overlaps

    @property
    def lockstep(self) -> bool:
        """See `Decoding.lockstep`."""
        return self._opened is not None and self._opened.lockstep

    def enqueue(self, row: Row) -> None:
        """Queue a row. Rows that continue go before rows that have not begun."""
        if row.begun:
            begun = sum(other.begun for other in self.queue)
            self.queue.insert(begun, row)
        else:
            self.queue.append(row)
        row.state, row.queued_at, self._unfit = "queued", time.perf_counter(), True

    def leave(self, row: Row, keep: bool) -> None:
        """Take a row out of its slot, if it has one. With `keep`, or if the row remembers them, its keys and values are
        saved before other rows overwrite them."""
        if (slot := blank(self.rows, row)) is None:
            return
        if keep or row.remember:
            self._leaving.append((slot, row, len(row.token_ids), keep))
        else:
            self._session.release(slot)
            self.spare(row.prompt)

    def spare(self, prompt: SharedPrompt) -> None:
        """Count one row of this prompt as finished; after the last row, free the prompt."""
        prompt.left -= 1
        if not prompt.left and self._opened is not None:
            self._session.forget(prompt)

    def will_rearrange(self) -> bool:
        """Whether `arrange` will change buffers that a step in flight may read."""
        if self._leaving or self._outgrown():
            return True
        self._holding = self._holds()
        if self._holding:
            return False
        if self.queue and self._unfit:
            return True
        free = self._free()
        entering = [self.queue[i] for i in range(min(len(free), len(self.queue)))]
        return self._is_tail(free) or self._session.needs_prefill(entering)

    def arrange(self) -> None:
        """Move queued rows into free slots, and add columns if needed. If no more rows can come, drop free slots when
        they are half of all slots, and before columns grow."""
        self._take_out()
        if self.queue and not any(self.rows):
            self._begin()
        if self._outgrown():
            self._grow()
        holds, self._holding = self._holds() if self._holding is None else self._holding, None
        if holds:
            return
        if self.queue and self._unfit:
            self._fit()
        free = self._free()
        if entering := [(slot, self.queue.popleft()) for slot in free[: len(self.queue)]]:
            self._admit(entering)
        elif self._is_tail(free):
            self._shrink()

    @property
    def widest(self) -> int:
        """See `Session.widest`."""
        return self._session.widest if self._opened is not None else 1

    def draw(self) -> Drawn:
        """Build the graph that draws one more token for every slot."""
        decoded = self._session.decoded()
        drawn = self._samplers.draw(self._session.logits(self._tokens), decoded, self._logprobs)
        self._tokens = drawn.tokens
        return drawn

    def draw_wide(self, fed: list[list[int]]) -> Drawn:
        """Build the graph that draws a token after each of the W fed tokens per slot: `[S · W]`. Then call `take`."""
        tokens, decoded = mx.array(fed, mx.uint32), self._session.decoded()
        return self._samplers.draw_wide(self._session.wide(tokens), tokens, decoded, self._logprobs)

    def take(self, taken: Sequence[Sequence[int]]) -> None:
        """Accept, for each slot, these of the drawn tokens. The session keeps the same number of fed tokens."""
        self._session.accept([len(tokens) for tokens in taken])
        self._samplers.take(taken)
        self._tokens = mx.array([tokens[-1] if tokens else 0 for tokens in taken], mx.uint32)

    def close(self) -> None:
        """Free all buffers."""
        if self._opened is not None:
            self._take_out()
            self._opened.close(self._session)
            del self._session, self._samplers, self._tokens
        self.rows, self._opened = [], None

    def abandon(self) -> None:
        """Free all buffers, and all keys and values that rows keep outside them. No row can come back."""
        self.queue.clear()
        self._leaving.clear()
        self.parking.clear()
        self.away = 0
        self.close()

    def _holds(self) -> bool:
        """Whether queued rows wait, so that more rows can enter together with them."""
        decoding = sum(row is not None for row in self.rows)
        entering = list(islice(self.queue, self._most_slots - decoding))
        if not (entering and decoding and self.overlaps and self._session.needs_prefill(entering)):
            return False
        if self.lockstep:
            return False
        now = time.perf_counter()
        return sum(now - row.queued_at for row in entering) < self._stall * decoding

    def _free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def _is_tail(self, free: Sequence[int]) -> bool:
        """Whether at least half the slots are empty and no row will enter them: then fewer slots are faster."""
        return not self._more_come and len(self.rows) > len(free) >= (len(self.rows) + 1) // 2

    @property
    def _more_come(self) -> bool:
        """Whether rows may still enter slots."""
        return bool(self.queue or self.away)

    def _take_out(self) -> None:
        for slot, row, tokens, keep in self._leaving:
            if row.remember and row.state != "released":
                row.computed = self._session.whole(slot, row)
            if keep and row.state != "released":
                # Without the row's last token: a step in flight may or may not have fed it.
                self.parking.put(row, self._session.take(slot, tokens))
            self._session.release(slot)
            if not keep:
                self.spare(row.prompt)
        self._leaving.clear()

    def _begin(self) -> None:
        """Open the buffers, or read the model's weights again: they may have changed while all slots were empty."""
        decoding = self._find_decoding()
        if decoding is self._opened:
            self._session.refresh()
            return
        self.parking.clear()  # another decoding cannot use the keys and values that were kept
        size = self._size()
        self._samplers, self._tokens = Samplers(size.slots, decoding.vocabulary), mx.zeros(size.slots, mx.uint32)
        self._opened, self._session = decoding, decoding.open(size)
        self.rows, self._unfit, self._columns = [None] * size.slots, False, size.columns

    def _size(self) -> Size:
        """The size that the rows in slots and in the queue need now."""
        rows = [row for row in (*self.rows, *self.queue) if row is not None]
        slots, prompts = min(self._most_slots, len(rows)), dict.fromkeys(row.prompt for row in rows)
        prefix = max(len(prompt.ids) for prompt in prompts) - 1
        columns = columns_for(self._needed(rows), max(row.longest for row in rows) + self._ahead)
        return Size(slots, min(len(prompts), slots), prefix, columns)

    def _needed(self, rows: Sequence[Row]) -> int:
        """The number of columns that the next step of these rows needs."""
        return max(max(row.launched, len(row.token_ids)) for row in rows) + 1 + self._ahead

    def _outgrown(self) -> bool:
        """Whether the next step needs more columns than the slots have."""
        rows = [row for row in self.rows if row is not None]
        return bool(rows) and self._needed(rows) > self._columns

    def _grow(self) -> None:
        """Add columns. Slots that stay free are dropped first, so that they get no columns."""
        if None in self.rows and not self._more_come:
            self._shrink()
        self._fit()

    def _fit(self) -> None:
        size, self._unfit = self._size(), False
        self._columns = max(self._columns, size.columns)
        self._session.fit(size)
        more = size.slots - len(self.rows)
        if more > 0:
            self._samplers.grow(size.slots)
            self._tokens = mx.pad(self._tokens, (0, more))
            self.rows += [None] * more

    def _admit(self, entering: Sequence[tuple[int, Row]]) -> None:
        slots, rows = [slot for slot, _ in entering], [row for _, row in entering]
        began = time.perf_counter()
        self._session.admit(slots, rows)
        self._stall += (time.perf_counter() - began - self._stall) / 4
        first = mx.array([row.last for row in rows], mx.uint32)
        # Not `self._tokens[...] = first`: a step that has not been read holds the same array object.
        self._tokens = mx.put_along_axis(self._tokens, mx.array(slots), first, axis=0)
        for slot, row in entering:
            self.parking.drop(row)
            row.state, row.launched = "decoding", len(row.token_ids)
            self.rows[slot] = row
        self._samplers.seat(entering, self.rows)
        self._logprobs = any(row.wants_logprobs for row in self.rows if row is not None)

    def _shrink(self) -> None:
        kept = [slot for slot, row in enumerate(self.rows) if row is not None]
        self._session.keep(kept)
        self._samplers.keep(kept)
        self._tokens = self._tokens[mx.array(kept)]
        self.rows = [self.rows[slot] for slot in kept]


def blank(rows: list[Row | None], row: Row) -> int | None:
    """Replace a row by None. Returns its slot, or None if it has no slot."""
    slot = next((slot for slot, other in enumerate(rows) if other is row), None)
    if slot is not None:
        rows[slot] = None
    return slot
