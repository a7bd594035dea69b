"""What a reward function asks of a completion, whatever the dataset's form is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def texts(completions: Iterable[Any]) -> list[str]:
    """Each completion as a text: it is one, or a list of messages whose last one counts."""
    return [str(c if isinstance(c, str) else c[-1]["content"]) for c in completions]
