"""Speculation: a step feeds each row several draft tokens, and keeps them as long as the draws equal the drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from grpo.generation.rows import Row


class Speculation(Protocol):
    """Decides how many tokens a step feeds each row, and drafts these tokens. `rows` has the row of each of S slots."""

    most: int
    """The largest number of tokens that a step may feed a row: limited by memory."""

    def width(self, rows: Sequence[Row | None]) -> int:
        """The number of tokens to feed each row at the next step: 1 for a plain step. Called once per step."""
        ...

    def propose(self, rows: Sequence[Row | None], width: int) -> list[list[int]]:
        """For each slot, up to `width - 1` tokens that may follow the row's last token."""
        ...

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        """Report a step of this width: the number of tokens that each slot accepted (0 without a row), and its time."""
        ...

    def ended(self, row: Row) -> None:
        """Report that a row's turn has ended: its tokens may become drafts later."""
        ...
