"""What alarms look back on: a few numbers of the first steps and of the last ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from grpo.objective.metrics import SAMPLE_SIZE
from grpo.types import FAILURES, Group, StepMetrics

FIRST, RECENT = 5, 25
"""Steps that are kept of a run's beginning, and of its end: more than `alarms.without_signal` can be."""
LENGTH_SUMS = ("length/products", "length/squared_rewards", "length/squared_lengths")
WITHOUT_ADVANTAGE = "without_advantage"
KEPT = (
    *("reward", "frac_reward_zero_std", "solved_all", "steps_without_signal", "entropy", "kl", "grad_norm"),
    *("completions/clipped_ratio", "completions/mean_length", "tools/failure_frequency", SAMPLE_SIZE),
)
"""The metrics that are looked back on, beside the rates of rewards' failures."""
RATES = tuple(f"/{kind}_rate" for kind in FAILURES)

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class BestMeasured:
    """The best evaluation so far: its step, its value with the lower end of the interval, and the training rewards of
    the steps around it."""

    step: int
    value: float
    low: float
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PastSteps:
    """The numbers of a run's `first` and `recent` steps by name, and its best evaluation. `told` has the step at which
    each kind of alarm was last reported, and `over` the kinds that have ended since. The last step is the last of
    `recent`."""

    first: tuple[Numbers, ...] = ()
    recent: tuple[Numbers, ...] = ()
    best: BestMeasured | None = None
    told: Mapping[str, int] = field(default_factory=dict)
    over: tuple[str, ...] = ()

    def after(self, metrics: StepMetrics) -> PastSteps:
        """The history with one step more."""
        numbers = _numbers(metrics)
        first = self.first if len(self.first) >= FIRST else (*self.first, numbers)
        return replace(self, first=first, recent=(*self.recent, numbers)[-RECENT:])

    def last(self, name: str, steps: int) -> list[float]:
        """What is known of a number in the last `steps` steps, the newest last."""
        return known(self.recent[-steps:], name)

    def mean(self, name: str, steps: int) -> float | None:
        """The mean of a number over the last `steps` steps; None if none of them has it."""
        values = self.last(name, steps)
        return fmean(values) if values else None

    def plain(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any] | None) -> PastSteps:
        """What `plain` was taken of; of None, from a checkpoint that has none, an empty past."""
        if plain is None:
            return cls()
        best = plain["best"] and BestMeasured(**{**plain["best"], "rewards": tuple(plain["best"]["rewards"])})
        told = (
            plain["told"] if isinstance(plain["told"], dict) else dict.fromkeys(plain["told"], 0)
        )  # older checkpoints
        return cls(tuple(plain["first"]), tuple(plain["recent"]), best, told, tuple(plain.get("over", ())))


def known(steps: Sequence[Numbers], name: str) -> list[float]:
    """The values of a number in those of the steps that have it."""
    return [numbers[name] for numbers in steps if name in numbers]


def _numbers(metrics: StepMetrics) -> dict[str, float]:
    kept = {
        name: value
        for name, value in metrics.values.items()
        if (name in KEPT or (name.startswith("rewards/") and name.endswith(RATES))) and math.isfinite(value)
    }
    return kept | length_sums(metrics.sampled) | _without_advantage(metrics.groups)


def _without_advantage(groups: Sequence[Group]) -> dict[str, float]:
    """1 where no completion of `groups` has an advantage and no teacher teaches any, else 0; empty without groups."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    learned = any(rollout.has_advantage or rollout.taught for rollout in rollouts)
    return {WITHOUT_ADVANTAGE: float(not learned)} if rollouts else {}


def length_sums(groups: Sequence[Group]) -> dict[str, float]:
    """What the correlation of reward and length is made of, each less its mean over the prompt's completions: the sums
    of products, of squares of rewards, and of squares of lengths.

    Empty where there are fewer than three lengths: two may be two ways to answer, of which one is right.
    """
    products = rewards = lengths = 0.0
    seen = set()
    for group in groups:
        pairs = [(one.reward, one.trajectory.trained_tokens) for one in group.rollouts if one.reward is not None]
        if not pairs:
            continue
        reward, length = (fmean(values) for values in zip(*pairs, strict=True))
        seen |= {tokens for _, tokens in pairs}
        products += sum((one - reward) * (tokens - length) for one, tokens in pairs)
        rewards += sum((one - reward) * (one - reward) for one, _ in pairs)  # too large for a float: inf, and no error
        lengths += sum((tokens - length) ** 2 for _, tokens in pairs)
    return dict(zip(LENGTH_SUMS, (products, rewards, lengths), strict=True)) if len(seen) >= 3 else {}


def length_correlation(steps: Sequence[Numbers]) -> float | None:
    """Pearson's correlation of reward and length within prompts, over all steps together; None where either does not
    differ, or where a sum is too large for a float."""
    products, rewards, lengths = (sum(known(steps, name)) for name in LENGTH_SUMS)
    squared = rewards * lengths
    return products / math.sqrt(squared) if squared > 0 and math.isfinite(squared) else None
