"""How far a phase of a step is: what those who do the work tell those who show it."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class RowCounts(NamedTuple):
    """The rows that are being sampled: how many have ended, of how many, and how many turns the model has begun in all
    of them."""

    ended: int
    rows: int
    turns: int


class Progress(Protocol):
    """Is called now and then with a phase, how much is done, and of how much.

    `rollout` and `evaluation` count tokens, of which `total` is an upper bound, and tell the rows besides; `reward`
    counts completions, and `update` micro-batches.
    """

    def __call__(self, phase: str, done: int, total: int, rows: RowCounts | None = None, /) -> None: ...
