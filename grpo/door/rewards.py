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
    """A reward as a recipe's line has it, and its function, if it was given as one."""

    config: RewardConfig
    function: Function | None = None


Rewardable = WeightedReward | Function | str
"""What a list of rewards may hold: `grpo.reward(...)`, a function, or a name that a recipe would use."""


def reward(use: Callable[..., Any] | str, **settings: Any) -> WeightedReward:
    """A reward with a weight or a name of its own: `grpo.reward(brief, weight=0.1, name="brevity")`.

    `use` is a function, or a name that a recipe would use (`"math_answer"`, `"file.py:function"`). A function has
    TRL's signature: it is called with keyword arguments, `prompts`, `completions`, `completion_ids` and each column of
    the data, all of them lists with one value per completion, and returns a list of as many scores: a float, or None
    for "no score". It may be `async`. A function runs in this process; a name runs in a process of its own, with a time
    limit, when `grpo.Trainer` uses it. `settings` are the recipe's for a reward: `weight` (1.0; 0 makes it a metric
    only), `name`, `kwargs`, `calls`, `completions`, `max_failure_rate`.

    Raises UserError for an unknown setting, and for a function without a name (`name=...` gives it one).

    >>> brief = grpo.reward(lambda completions, **_: [-len(text) for text in completions], weight=0.1, name="brief")
    >>> brief.config.name, brief.config.weight
    ('brief', 0.1)
    """
    if not callable(use):
        return WeightedReward(with_settings(RewardConfig(use=use), settings, SAID_BY))
    named = getattr(use, "__name__", type(use).__name__)
    if named == "<lambda>" and "name" not in settings:
        raise UserError(f"{SAID_BY}: a lambda has no name for its metrics: grpo.reward(function, name=...)")
    module = getattr(use, "__module__", None) or SESSION
    if module != SESSION:  # a file's `reward` goes by the file's name, as in a recipe
        named = called(module, named)
    config = RewardConfig(use=name_of(use), isolation="inline", name=named)
    return WeightedReward(with_settings(config, settings, SAID_BY), use)


def as_rewards(rewards: Sequence[Rewardable]) -> list[WeightedReward]:
    """Rewards of all forms as one form. Raises UserError for what is no list of rewards."""
    if callable(rewards) or isinstance(rewards, str | WeightedReward) or not isinstance(rewards, Iterable):
        raise UserError(f"rewards: expected a list, such as [my_reward], got {kind_of(rewards)}")
    rewards = list(rewards)
    odd: list[Any] = [given for given in rewards if not (callable(given) or isinstance(given, str | WeightedReward))]
    if odd:
        raise UserError(f"rewards: expected functions, names, or what grpo.reward gives, got {kind_of(odd[0])}")
    return [given if isinstance(given, WeightedReward) else reward(given) for given in rewards]


def score(groups: Sequence[Group], rewards: Sequence[Rewardable]) -> list[Group]:
    """The same groups with scores: each rollout gets `scores` by reward name, and `reward`, their weighted sum.

    Each reward is called once, in this process, with all completions. A function that raises, or answers with something
    that is no number, has failed: its completions have None for a score and for a reward, and `failures` says why. They
    are left out of their group's baseline, and never count as 0.

    Raises UserError for a reward that is not there or cannot be called with these columns, and RunError where a
    function fails on more than half of the completions (`max_failure_rate`).

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
        raise UserError(f"rewards: two of them are called {twice!r}: name one of them, grpo.reward(..., name=...)")
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
    """The reward in this process, wherever its function comes from."""
    config, function = given.config, given.function
    if config.judges:
        raise UserError(SELF)
    if config.model:
        return Modeled(config)
    located = locate_reward(config.use)
    return Inline(
        config.name or located.name, function or located.load(), config.kwargs, config.calls, config.completions
    )
