"""Keys and values of rows that are out of their slots, within a bound."""

from __future__ import annotations

from grpo.generation.rows import Kept, Row


class Parking:
    """Rows by age, at most `most_bytes` of what they keep (None: no bound).

    Beyond that the oldest rows' keys and values are dropped. They are computed again when the row goes on.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._rows: dict[Row, int] = {}

    def put(self, row: Row, kept: Kept) -> None:
        """Keep this for a row."""
        row.kept = kept
        self._rows[row] = kept.nbytes
        self.nbytes += kept.nbytes
        while self.most_bytes is not None and self.nbytes > self.most_bytes:
            self.drop(next(iter(self._rows)))

    def drop(self, row: Row) -> None:
        """Keep nothing for a row any more."""
        self.nbytes -= self._rows.pop(row, 0)
        row.kept = None

    def clear(self) -> None:
        """Keep nothing at all."""
        for row in list(self._rows):
            self.drop(row)
