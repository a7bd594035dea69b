"""A reward that takes its time, for `grpo bench overlap`. Its worker imports this, so it imports nothing heavy."""

from __future__ import annotations

import time
from typing import Any

CALLS = "group"


def reward(completions: list[Any], seconds: float = 0.0, **_: Any) -> list[float]:
    """Scores that differ within a group, after so many seconds."""
    time.sleep(seconds)
    return [float(place % 2) for place in range(len(completions))]
