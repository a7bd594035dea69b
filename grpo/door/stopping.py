"""`grpo.STOP`: a callback returns it to end a run."""

from __future__ import annotations

from enum import Enum
from typing import Final


class _Stop(Enum):
    STOP = "stop"

    def __repr__(self) -> str:
        return "grpo.STOP"


STOP: Final = _Stop.STOP
"""A callback of `grpo.Trainer` that returns this value ends the run after the current step. The step is saved, and a
later `train()` resumes after it."""
