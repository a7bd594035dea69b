"""How far rows are, told now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable

from grpo.generation.rows import Row
from grpo.types import Progress

TELL_EVERY = 0.5
"""Seconds between two reports: counting tokens at every step would be work for the host."""


class TokenProgress:
    """Tells of a phase how many tokens there are, and the most that there can be, which falls as rows stop."""

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
        self._progress(self._phase, done, done + left)
