"""The built-in tasks, by name, and their rows."""

from __future__ import annotations

from typing import Any

from grpo.builtin.arithmetic import ARITHMETIC
from grpo.builtin.countdown import COUNTDOWN
from grpo.builtin.exercise import Exercise
from grpo.builtin.format import FORMAT
from grpo.builtin.guess import GUESS
from grpo.builtin.shop import SHOP
from grpo.builtin.sorting import SORTING
from grpo.builtin.walk import WALK
from grpo.errors import UserError

TASKS: dict[str, Exercise] = {
    "builtin:arithmetic": ARITHMETIC,
    "builtin:countdown": COUNTDOWN,
    "builtin:sorting": SORTING,
    "builtin:format": FORMAT,
    "builtin:guess": GUESS,
    "builtin:shop": SHOP,
    "builtin:walk": WALK,
}


def rows(source: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a built-in task in a fixed shuffled order: the column `question`, and columns for its reward.

    Raises UserError for an unknown task or split.
    """
    if source not in TASKS:
        raise UserError(f"data {source}: there is no such built-in task; choose one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise UserError(f"data {source}: there is no split {split!r}; use 'train' or 'test'")
    task = TASKS[source]
    return [task.row(problem) for problem in task.problems(split)]
