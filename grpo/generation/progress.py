"""Reports the progress of rows at intervals."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from grpo.generation.rows import Row
from grpo.progress import Progress, RowCounts

TELL_EVERY = 0.5
"""Seconds between two reports: counting tokens at every step would cost the host time."""


class TokenProgress:
    """Reports a phase's number of tokens, its upper bound (which falls as rows end), and counts of rows."""

    def __init__(self, progress: Progress | None, phase: str) -> None:
        self._progress, self._phase, self._told = progress, phase, 0.0

    def now_and_then(self, groups: Iterable[Iterable[Row]]) -> None:
        """Report if `TELL_EVERY` seconds have passed since the last report."""
        if self._progress is not None and (now := time.monotonic()) - self._told >= TELL_EVERY:
            self._told = now
            self.tell(groups)

    def tell(self, groups: Iterable[Iterable[Row]]) -> None:
        """Report now."""
        if self._progress is None:
            return
        rows = [row for group in groups for row in group]
        done = sum(len(row.token_ids) for row in rows)
        left = sum(row.longest - len(row.token_ids) for row in rows if row.finish_reason is None)
        self._progress(self._phase, done, done + left, _counts(rows))


def _counts(rows: Sequence[Row]) -> RowCounts:
    """The numbers of rows, ended rows, and turns begun: each row has one more turn than injected spans."""
    ended = sum(row.state in ("done", "released") for row in rows)
    turns = sum(1 + sum(span.start >= row.opening for span in row.injected) for row in rows if row.begun)
    return RowCounts(ended, len(rows), turns)
