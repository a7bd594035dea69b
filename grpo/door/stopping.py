"""`grpo.STOP`: what a callback returns to end a run."""

from __future__ import annotations

from enum import Enum
from typing import Final


class _Stop(Enum):
    STOP = "stop"

    def __repr__(self) -> str:
        return "grpo.STOP"


STOP: Final = _Stop.STOP
"""A callback of `grpo.Trainer` that returns this ends the run after the step that it was told of: the step is saved,
and a later `train()` goes on."""
