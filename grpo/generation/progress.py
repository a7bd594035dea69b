"""How far rows are, told now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from grpo.generation.rows import Row
from grpo.progress import Progress, RowCounts

TELL_EVERY = 0.5
"""Seconds between two reports: counting tokens at every step would be work for the host."""


class TokenProgress:
    """Tells of a phase how many tokens there are, the most that there can be (it falls as rows stop), and the rows."""

    def __init__(self, progress: Progress | None, phase: str) -> None:
        self._progress, self._phase, self._told = progress, phase, 0.0

    def now_and_then(self, groups: Iterable[Iterable[Row]]) -> None:
        """Tell if it is time."""
        if self._progress is not None and (now := time.monotonic()) - self._told >= TELL_EVERY:
            self._told = now
            self.tell(groups)

    def tell(self, groups: Iterable[Iterable[Row]]) -> None:
        """Tell at once."""
        if self._progress is None:
            return
        rows = [row for group in groups for row in group]
        done = sum(len(row.token_ids) for row in rows)
        left = sum(row.longest - len(row.token_ids) for row in rows if row.finish_reason is None)
        self._progress(self._phase, done, done + left, _counts(rows))


def _counts(rows: Sequence[Row]) -> RowCounts:
    """How many of the rows have ended, and how many turns have begun: one more than what was put between them."""
    ended = sum(row.state in ("done", "released") for row in rows)
    turns = sum(1 + sum(span.start >= row.opening for span in row.injected) for row in rows if row.begun)
    return RowCounts(ended, len(rows), turns)
