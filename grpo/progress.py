"""The protocol of progress reports: from the code that does the work to the code that shows the progress."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class RowCounts(NamedTuple):
    """Counts of the rows of a rollout: finished rows, all rows, and turns that the model has begun in all rows."""

    ended: int
    rows: int
    turns: int


class Progress(Protocol):
    """A progress callback: `(phase, done, total, rows)`.

    `rollout` and `evaluation` count tokens, with an upper bound as `total`, and may also pass `rows`; `reward` counts
    completions, and `update` counts micro-batches.
    """

    def __call__(self, phase: str, done: int, total: int, rows: RowCounts | None = None, /) -> None: ...
