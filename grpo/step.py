"""What tools and environments may return: the seam to the code of a researcher's environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """What a tool, or an environment's `step`, may return in the place of its bare result.

    `result` goes to the model; None adds nothing. `reward` is for the turn that led here. `done` ends the conversation.
    Any object with these three attributes is taken alike.
    """

    result: Any = None
    reward: float | None = None
    done: bool = False
