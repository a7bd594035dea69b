"""Reward functions applied to groups.

TRL's contract: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, plain or `async`.
A function that raises, or answers with something that is not a finite number, has failed for those completions:
they score None, which keeps them out of their group's baseline, and a counter says so. It never becomes a zero.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo.config import RewardConfig
from grpo.errors import RunError, UserError
from grpo.plugins import Function, find_reward
from grpo.types import Completion, Group, Rollout


@dataclass(frozen=True, slots=True)
class Scores:
    """One function's answers for a step: a score or None for each completion, and how many of them failed."""

    values: list[float | None]
    failed: int = 0
    error: str | None = None


class Scorer:
    """The reward functions of a recipe."""

    def __init__(self, rewards: Mapping[str, Function]) -> None:
        self.rewards = rewards
        self.failures = dict.fromkeys(rewards, 0)

    @classmethod
    def of(cls, configs: Sequence[RewardConfig]) -> Scorer:
        """The functions that a recipe names. Raises UserError, as find_reward does."""
        rewards: dict[str, Function] = {}
        for config in configs:
            name, function = find_reward(config.use)
            if name in rewards:
                raise UserError(f"rewards: two of them are called {name!r}; metrics need one name each")
            rewards[name] = function
        return cls(rewards)

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with `scores` in their rollouts.

        Raises RunError, with the function's own traceback, when a function fails on all of them: a broken grader
        is not training.
        """
        columns = _columns(groups)
        scores = {name: self._call(name, columns) for name in self.rewards}
        flat = iter(range(len(columns["completions"])))
        return [
            replace(group, rollouts=tuple(_scored(rollout, scores, next(flat)) for rollout in group.rollouts))
            for group in groups
        ]

    def _call(self, name: str, columns: dict[str, Any]) -> Scores:
        count = len(columns["completions"])
        try:
            answer = self.rewards[name](**columns)
            values = asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer
            scores = _checked(values, count)
        except Exception as error:  # other people's code: recorded, shown, and kept out of the gradient
            scores = Scores([None] * count, count, _own_traceback(error))
        self.failures[name] += scores.failed
        if scores.failed == count:
            raise RunError(f"reward {name!r} failed on every completion of a step:\n{scores.error}")
        return scores


def _columns(groups: Sequence[Group]) -> dict[str, Any]:
    """What a reward function receives: a value for each completion, by name."""
    rows = [(group.task, rollout.completion) for group in groups for rollout in group.rollouts]
    names = {name for task, _ in rows for name in task.columns}
    columns: dict[str, Any] = {name: [task.columns.get(name) for task, _ in rows] for name in names}
    columns["prompts"] = [task.prompt for task, _ in rows]
    columns["completions"] = [_as_prompted(task.prompt, completion) for task, completion in rows]
    columns["completion_ids"] = [list(completion.token_ids) for _, completion in rows]
    columns.pop("prompt", None)  # as in TRL: it is there as `prompts`
    return columns


def _as_prompted(prompt: Any, completion: Completion) -> Any:
    """Text for a text prompt, a list of one message for a prompt of messages."""
    return completion.text if isinstance(prompt, str) else [{"role": "assistant", "content": completion.text}]


async def _awaited(answer: Any) -> Any:
    return await answer


def _checked(values: Any, count: int) -> Scores:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(
            f"a reward returns a list with a number or None for each completion, not {type(values).__name__}"
        )
    if len(values) != count:
        raise ValueError(f"{len(values)} scores for {count} completions")
    scores = [_number(value) for value in values]
    wrong = [value for value, score in zip(values, scores, strict=True) if value is not None and score is None]
    return Scores(scores, len(wrong), f"not a finite number: {wrong[0]!r}" if wrong else None)


def _number(value: Any) -> float | None:
    """The value as a float, or None for what is not a finite number (numpy's scalars are numbers)."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _own_traceback(error: BaseException) -> str:
    """The traceback from the reward function inwards."""
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    return "".join(traceback.format_exception(type(error), error, inner)).rstrip()


def _scored(rollout: Rollout, scores: Mapping[str, Scores], position: int) -> Rollout:
    return replace(rollout, scores={name: answer.values[position] for name, answer in scores.items()})
