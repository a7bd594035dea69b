"""Reward functions applied to groups.

TRL's contract: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, plain or `async`.
A function that raises, or answers with something that is not a usable number, has failed for those completions:
they score None, which keeps them out of their group's baseline, and a counter says so. It never becomes a zero.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from grpo.config import RewardConfig
from grpo.errors import RunError, UserError
from grpo.plugins import Function, find_reward
from grpo.types import Completion, Group, Rollout

log = logging.getLogger(__name__)

PATIENCE = 3
"""Calls in a row on which a function may fail altogether, once it has worked."""
LARGEST = 1e15
"""The largest score: beyond it a group's deviation would overflow float32."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One function's answers for a step: a score or None for each completion, and the places of those it failed on."""

    values: list[float | None]
    failed: frozenset[int] = frozenset()
    error: str | None = None


class Scorer:
    """The reward functions of a recipe. `failures` counts, by name, the completions that a function failed on."""

    def __init__(self, rewards: Mapping[str, Function], metrics_only: Collection[str] = ()) -> None:
        """`metrics_only` names the functions that may fail as they like, because nothing is learnt from them."""
        self.rewards = rewards
        self.metrics_only = metrics_only
        self.failures = dict.fromkeys(rewards, 0)
        self._in_a_row = dict.fromkeys(rewards, PATIENCE - 1)  # failing at its first call, a function is broken

    @classmethod
    def of(cls, configs: Sequence[RewardConfig]) -> Scorer:
        """The functions that a recipe names. Raises UserError, as find_reward does."""
        rewards: dict[str, Function] = {}
        for config in configs:
            name, function = find_reward(config.use)
            if name in rewards:
                raise UserError(f"rewards: two of them are called {name!r}; metrics need one name each")
            rewards[name] = function
        weightless = {name for name, config in zip(rewards, configs, strict=True) if config.weight == 0}
        return cls(rewards, weightless)

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with `scores` in their rollouts.

        Raises RunError, with the function's own traceback, when a function fails on all of them at its first call or
        `PATIENCE` times in a row: a broken grader is not training.
        """
        columns = _columns(groups)
        scores = {name: self._call(name, columns) for name in self.rewards}
        failed = set().union(*(answer.failed for name, answer in scores.items() if name not in self.metrics_only))
        places = iter(range(len(columns["completions"])))
        return [
            replace(group, rollouts=tuple(_scored(r, scores, failed, next(places)) for r in group.rollouts))
            for group in groups
        ]

    def state(self) -> dict[str, dict[str, int]]:
        """What it has counted: what `load_state` takes."""
        return {"failures": dict(self.failures), "in_a_row": dict(self._in_a_row)}

    def load_state(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on counting; a function that is new starts from nothing."""
        for counts, saved in ((self.failures, state["failures"]), (self._in_a_row, state["in_a_row"])):
            counts.update({name: count for name, count in saved.items() if name in counts})

    def check(self, columns: Collection[str]) -> None:
        """Raise UserError for a function that could not be called with these columns of the dataset."""
        given = {*columns, "prompts", "completions", "completion_ids"} - {"prompt"}
        for name, function in self.rewards.items():
            try:
                inspect.signature(function).bind(**dict.fromkeys(given))
            except ValueError:  # a builtin without a signature
                continue
            except TypeError as error:
                there = ", ".join(sorted(given))
                raise UserError(
                    f"reward {name!r}: {error}; it is called with {there} (take **_ for the rest)"
                ) from None

    def _call(self, name: str, columns: dict[str, Any]) -> Scores:
        count = len(columns["completions"])
        try:
            answer = self.rewards[name](**columns)
            values = asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer
            values = list(values) if _is_listlike(values) else values
        except (Exception, SystemExit) as error:  # other people's code: recorded, shown, kept out of the gradient
            scores = _all_failed(count, _own_traceback(error))
        else:
            scores = _checked(values, count)
        self._judge(name, scores, broken=len(scores.failed) == count)
        return scores

    def _judge(self, name: str, scores: Scores, broken: bool) -> None:
        first = bool(scores.failed) and not self.failures[name]
        self.failures[name] += len(scores.failed)
        self._in_a_row[name] = self._in_a_row[name] + 1 if broken else 0
        if self._in_a_row[name] >= PATIENCE and name not in self.metrics_only:
            raise RunError(f"reward {name!r} failed on every completion: {scores.error}")
        if first:
            log.warning("reward %r failed on %d completions: %s", name, len(scores.failed), scores.error)


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
    """What a function returned, against the contract."""
    if not isinstance(values, list):
        return _all_failed(count, f"a list with a number or None for each completion was expected, not {values!r:.80}")
    if len(values) != count:
        return _all_failed(count, f"{len(values)} scores for {count} completions")
    scores = [_number(value) for value in values]
    failed = frozenset(i for i, value in enumerate(values) if value is not None and scores[i] is None)
    return Scores(scores, failed, f"not a usable number: {values[min(failed)]!r:.80}" if failed else None)


def _is_listlike(values: Any) -> bool:
    """Lists, tuples, arrays, generators; not what only happens to be iterable."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)


def _all_failed(count: int, error: str) -> Scores:
    return Scores([None] * count, frozenset(range(count)), error)


def _number(value: Any) -> float | None:
    """The value as a float, or None for what is not a number between ± LARGEST (numpy's scalars are numbers)."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # false for NaN


def _own_traceback(error: BaseException) -> str:
    """The traceback from the reward function inwards."""
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    return "\n" + "".join(traceback.format_exception(type(error), error, inner)).rstrip()


def _scored(rollout: Rollout, scores: Mapping[str, Scores], failed: set[int], place: int) -> Rollout:
    own = {name: answer.values[place] for name, answer in scores.items()}
    return replace(rollout, scores=own, failed=place in failed)
