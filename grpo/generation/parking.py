"""Keys and values of rows outside their slots, within a memory limit."""

from __future__ import annotations

from grpo.generation.rows import Kept, Row


class Parking:
    """Holds keys and values of rows, at most `most_bytes` in total (None: no limit).

    Above the limit, the oldest keys and values are dropped. They are computed again when their row continues.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._rows: dict[Row, int] = {}

    def put(self, row: Row, kept: Kept) -> None:
        """Keep a row's keys and values."""
        row.kept = kept
        self._rows[row] = kept.nbytes
        self.nbytes += kept.nbytes
        while self.most_bytes is not None and self.nbytes > self.most_bytes:
            self.drop(next(iter(self._rows)))

    def drop(self, row: Row) -> None:
        """Drop a row's keys and values."""
        self.nbytes -= self._rows.pop(row, 0)
        row.kept = None

    def clear(self) -> None:
        """Drop everything."""
        for row in list(self._rows):
            self.drop(row)
