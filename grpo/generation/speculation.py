"""Speculation: several tokens of a row are guessed, fed together, and kept as far as the draws equal the guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from grpo.generation.rows import Row


class Speculation(Protocol):
    """What decides how many tokens a step feeds, and drafts them. S slots."""

    most: int
    """Tokens that a step may feed a row at the most: as many as there is memory for."""

    def width(self, rows: Sequence[Row | None]) -> int:
        """How many tokens to feed each row at the next step: 1 for a plain step. Asked at every step."""
        ...

    def propose(self, rows: Sequence[Row | None], width: int) -> list[list[int]]:
        """For each slot, up to `width - 1` tokens that may follow the row's last."""
        ...

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        """A step of this width was read: how many tokens each slot took (0 without a row), and the time it took."""
        ...

    def ended(self, row: Row) -> None:
        """A row's turn has ended: its tokens may be drafts later."""
        ...
