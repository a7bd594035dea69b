"""`grpo.reward` and `grpo.score`: functions that grade completions, as Python objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config import RewardConfig
from grpo.door.checks import groups_of, kind_of
from grpo.errors import UserError
from grpo.objective.groups import with_rewards
from grpo.plugins import SESSION, Function, called, locate_reward
from grpo.recipes import with_settings
from grpo.runs.given import name_of
from grpo.scoring.grader import Inline
from grpo.scoring.judge import SELF
from grpo.scoring.modeled import Modeled
from grpo.scoring.scorer import Scorer
from grpo.types import Group

SAID_BY = "grpo.reward"


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A reward's entry in a recipe, and its function if it was passed as an object."""

    config: RewardConfig
    function: Function | None = None


Rewardable = WeightedReward | Function | str
"""An item in a list of rewards: `grpo.reward(...)`, a function, or a name as in a recipe."""


def reward(use: Callable[..., Any] | str, **settings: Any) -> WeightedReward:
    """Return a reward with settings: `grpo.reward(brief, weight=0.1, name="brevity")`.

    `use` is a function, or a name as in a recipe (`"math_answer"`, `"file.py:function"`). A function has TRL's
    signature: it is called with the keyword arguments `prompts`, `completions`, `completion_ids` and each column of the
    data, all lists with one value per completion. It returns a list with one score per completion: a float, or None for
    "no score". It may be `async`. A function runs in this process. With `grpo.Trainer`, a reward given by name runs in
    a separate process with a time limit. `settings` are the recipe's settings for a reward: `weight` (1.0; 0 makes it
    only a metric), `name`, `kwargs`, `calls`, `completions`, `max_failure_rate`.

    Raises UserError for an unknown setting, and for a function without a name (set `name=...`).

    >>> brief = grpo.reward(lambda completions, **_: [-len(text) for text in completions], weight=0.1, name="brief")
    >>> brief.config.name, brief.config.weight
    ('brief', 0.1)
    """
    if not callable(use):
        return WeightedReward(with_settings(RewardConfig(use=use), settings, SAID_BY))
    named = getattr(use, "__name__", type(use).__name__)
    if named == "<lambda>" and "name" not in settings:
        raise UserError(f"{SAID_BY}: a lambda has no name for its metrics: use grpo.reward(function, name=...)")
    module = getattr(use, "__module__", None) or SESSION
    if module != SESSION:  # a function `reward` in a file has the file's name, as in a recipe
        named = called(module, named)
    config = RewardConfig(use=name_of(use), isolation="inline", name=named)
    return WeightedReward(with_settings(config, settings, SAID_BY), use)


def as_rewards(rewards: Sequence[Rewardable]) -> list[WeightedReward]:
    """Return all rewards as WeightedReward. Raises UserError if `rewards` is not a list of rewards."""
    if callable(rewards) or isinstance(rewards, str | WeightedReward) or not isinstance(rewards, Iterable):
        raise UserError(f"rewards: expected a list, such as [my_reward], got {kind_of(rewards)}")
    rewards = list(rewards)
    odd: list[Any] = [given for given in rewards if not (callable(given) or isinstance(given, str | WeightedReward))]
    if odd:
        raise UserError(f"rewards: expected functions, names, or grpo.reward(...), got {kind_of(odd[0])}")
    return [given if isinstance(given, WeightedReward) else reward(given) for given in rewards]


def score(groups: Sequence[Group], rewards: Sequence[Rewardable]) -> list[Group]:
    """Return the groups with scores: each rollout gets `scores` by reward name, and `reward`, their weighted sum.

    Each reward is called once, in this process, with all completions. If a function raises, or returns a value that is
    not a number, it has failed: the score and the reward of these completions are None, and `failures` says why. Failed
    completions do not count in their group's baseline, and never count as 0.

    Raises UserError for a reward that does not exist or cannot be called with these columns, and RunError if a function
    fails on more than half of the completions (`max_failure_rate`).

    >>> groups = grpo.score(groups, [brevity, "gsm8k_answer"])
    >>> sorted(groups[0].rollouts[0].scores)
    ['brevity', 'gsm8k_answer']
    """
    groups = groups_of(groups, "grpo.score")
    if not groups:
        return []
    known = as_rewards(rewards)
    if not known:
        raise UserError("rewards: the list is empty, so nothing would be scored")
    graders = [_inline(given) for given in known]
    configs = {grader.name: given.config for grader, given in zip(graders, known, strict=True)}
    if len(configs) < len(graders):
        names = [grader.name for grader in graders]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"rewards: two rewards have the name {twice!r}: rename one with grpo.reward(..., name=...)")
    scorer = Scorer(
        {grader.name: grader for grader in graders},
        weights={name: config.weight for name, config in configs.items()},
        max_failure_rates={name: config.max_failure_rate for name, config in configs.items()},
    )
    try:
        scorer.check(groups[0].task.columns)
        return with_rewards(scorer.score(groups), scorer.weights)
    finally:
        scorer.close()


def _inline(given: WeightedReward) -> Inline:
    """Return the reward's grader, which runs in this process."""
    config, function = given.config, given.function
    if config.judges:
        raise UserError(SELF)
    if config.model:
        return Modeled(config)
    located = locate_reward(config.use)
    return Inline(
        config.name or located.name, function or located.load(), config.kwargs, config.calls, config.completions
    )
