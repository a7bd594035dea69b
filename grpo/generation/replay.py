"""Estimates acceptance without running the model: replays the tokens of a decoded group against drafts for them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.generation.drafts import Siblings
from grpo.generation.rows import Row


@dataclass(slots=True)
class Taken:
    """Sums of accepted `tokens` over `turns`; a turn is one step of one row. Old turns gradually lose weight."""

    tokens: float = 0.0
    turns: float = 0.0

    MEMORY = 2048
    """Number of turns after which all turns so far count half."""

    def add(self, tokens: float, turns: float) -> None:
        """Add tokens and turns."""
        self.tokens, self.turns = self.tokens + tokens, self.turns + turns
        if self.turns > self.MEMORY:
            self.tokens, self.turns = self.tokens / 2, self.turns / 2

    @property
    def mean(self) -> float:
        """Tokens per turn; 1, as in plain decoding, if there are no turns yet."""
        return self.tokens / self.turns if self.turns else 1.0


def replay(group: Siblings, rows: Sequence[Row], width: int, until: float = math.inf) -> tuple[int, int]:
    """Replay the rows of a group with steps of `width` tokens, all rows in parallel from their beginnings.

    Returns the number of sampled tokens and the number of turns that they took, without tokens that an earlier replay
    has counted. As in decoding, drafts come from the rows' tokens up to that step, and from older completions. Stops
    when the clock (`time.perf_counter`) reaches `until`.
    """
    index, prompt = group.new_index()
    states, places = [prompt] * len(rows), [0] * len(rows)
    sampled = turns = 0
    alive = [number for number, row in enumerate(rows) if row.token_ids]  # a row that has just begun has no tokens
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
    """The number of tokens that a row accepts from `place` on: one, and one more per draft that equals its token."""
    tokens, taken = row.token_ids, 1
    stop = min([len(tokens), *(span.start for span in row.injected if span.start > place)])
    for draft in drafts:
        if draft != tokens[place + taken - 1] or place + taken >= stop:
            break
        taken += 1
    return taken
