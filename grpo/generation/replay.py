"""What speculation would have taken: a group that was decoded is decoded again, from its tokens alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.generation.drafts import Siblings
from grpo.generation.rows import Row


@dataclass(slots=True)
class Taken:
    """How many `tokens` rows took in so many `turns`: a turn is one step of one row. Old turns count less and less."""

    tokens: float = 0.0
    turns: float = 0.0

    MEMORY = 2048
    """Turns after which those so far count half."""

    def add(self, tokens: float, turns: float) -> None:
        """Count so many more."""
        self.tokens, self.turns = self.tokens + tokens, self.turns + turns
        if self.turns > self.MEMORY:
            self.tokens, self.turns = self.tokens / 2, self.turns / 2

    @property
    def mean(self) -> float:
        """Tokens a turn: 1, as in plain decoding, before any is known."""
        return self.tokens / self.turns if self.turns else 1.0


def replay(group: Siblings, rows: Sequence[Row], width: int, until: float = math.inf) -> tuple[int, int]:
    """Decode the rows of a group once more with steps of `width` tokens, all from their beginnings side by side.

    Returns the tokens that were sampled, and in how many turns of a row, without the tokens of an earlier replay.
    Drafts come from what the rows had said by then, and from what was known before them. It breaks off when the clock
    (`time.perf_counter`) says `until`.
    """
    index, prompt = group.new_index()
    states, places = [prompt] * len(rows), [0] * len(rows)
    sampled = turns = 0
    alive = list(range(len(rows)))
    while alive and time.perf_counter() < until:
        for number in alive:
            row, place = rows[number], places[number]
            end = next((span.stop for span in row.injected if span.start <= place < span.stop), None)
            if end is None:
                end = place + _agreeing(row, place, index.likely(states[number], width - 1))
                if place >= group.replayed.get(row, 0):
                    sampled, turns = sampled + end - place, turns + 1
            states[number] = index.extend(states[number], row.token_ids[place:end])
            places[number] = end
        alive = [number for number in alive if places[number] < len(rows[number].token_ids)]
    return sampled, turns


def _agreeing(row: Row, place: int, drafts: Sequence[int]) -> int:
    """How many tokens a row takes from this place on: one, and one more for each draft that is what it said."""
    tokens, taken = row.token_ids, 1
    stop = min([len(tokens), *(span.start for span in row.injected if span.start > place)])
    for draft in drafts:
        if draft != tokens[place + taken - 1] or place + taken >= stop:
            break
        taken += 1
    return taken
