"""The type that tools and environments may return: the interface to the code of a user's environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """The return value of a tool, or of an environment's `step`, with more than a plain result.

    `result` goes to the model; None adds nothing. `reward` is the reward of the model's last turn. `done` ends the
    conversation. Any object with these three attributes works in the same way.
    """

    result: Any = None
    reward: float | None = None
    done: bool = False
