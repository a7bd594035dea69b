"""Completions as texts, whatever form they have, and numbers of them in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def texts(completions: Iterable[Any]) -> list[str]:
    """Each completion as a text: it is one, or a list of messages whose last one counts."""
    return [as_text(completion) for completion in completions]


def as_text(value: Any) -> str:
    """A text as it is; of messages the content of the last."""
    return str(value if isinstance(value, str) else value[-1]["content"])


def counted(count: int, noun: str = "completion") -> str:
    """`1 completion`, `2,000 completions`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
