"""A slow reward for `grpo bench overlap`. Its worker imports this module, so it imports nothing heavy."""

from __future__ import annotations

import time
from typing import Any

CALLS = "group"


def reward(completions: list[Any], seconds: float = 0.0, **_: Any) -> list[float]:
    """Scores that differ within a group, after `seconds` seconds."""
    time.sleep(seconds)
    return [float(place % 2) for place in range(len(completions))]
