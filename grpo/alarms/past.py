"""The history that alarms use: a few numbers of a run's first steps and of its most recent steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from grpo.objective.metrics import SAMPLE_SIZE
from grpo.types import FAILURES, Group, StepMetrics

FIRST, RECENT = 5, 25
"""Number of first steps and of recent steps that are kept; `RECENT` is above the maximum of `alarms.without_signal`."""
LENGTH_SUMS = ("length/products", "length/squared_rewards", "length/squared_lengths")
KEPT = (
    *("reward", "frac_reward_zero_std", "solved_all", "steps_without_signal", "entropy", "kl", "grad_norm"),
    *("completions/clipped_ratio", "completions/mean_length", "tools/failure_frequency", SAMPLE_SIZE),
)
"""The metrics that are kept, besides the failure rates of rewards."""
RATES = tuple(f"/{kind}_rate" for kind in FAILURES)

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class BestMeasured:
    """The best evaluation so far: its step, its value with the lower end of the interval, and the training rewards of
    the steps before it."""

    step: int
    value: float
    low: float
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PastSteps:
    """The numbers of a run's `first` and `recent` steps by name, its best evaluation, and the kinds of alarms that were
    already reported (`told`). The last item of `recent` is the current step."""

    first: tuple[Numbers, ...] = ()
    recent: tuple[Numbers, ...] = ()
    best: BestMeasured | None = None
    told: tuple[str, ...] = ()

    def after(self, metrics: StepMetrics) -> PastSteps:
        """The history with one more step."""
        numbers = _numbers(metrics)
        first = self.first if len(self.first) >= FIRST else (*self.first, numbers)
        return replace(self, first=first, recent=(*self.recent, numbers)[-RECENT:])

    def last(self, name: str, steps: int) -> list[float]:
        """The values of a number in the last `steps` steps, oldest first, without the steps that lack it."""
        return known(self.recent[-steps:], name)

    def mean(self, name: str, steps: int) -> float | None:
        """The mean of a number over the last `steps` steps; None if none of them has it."""
        values = self.last(name, steps)
        return fmean(values) if values else None

    def plain(self) -> dict[str, Any]:
        """The history as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any] | None) -> PastSteps:
        """The history from the result of `plain`; an empty history for None (a checkpoint without a history)."""
        if plain is None:
            return cls()
        best = plain["best"] and BestMeasured(**{**plain["best"], "rewards": tuple(plain["best"]["rewards"])})
        return cls(tuple(plain["first"]), tuple(plain["recent"]), best, tuple(plain["told"]))


def known(steps: Sequence[Numbers], name: str) -> list[float]:
    """The values of a number in the steps that have it."""
    return [numbers[name] for numbers in steps if name in numbers]


def _numbers(metrics: StepMetrics) -> dict[str, float]:
    kept = {
        name: value
        for name, value in metrics.values.items()
        if (name in KEPT or (name.startswith("rewards/") and name.endswith(RATES))) and math.isfinite(value)
    }
    return kept | length_sums(metrics.sampled)


def length_sums(groups: Sequence[Group]) -> dict[str, float]:
    """Sums for the correlation of reward and length, both centered on the mean of the prompt's completions: sums of
    products, of squared rewards, and of squared lengths.

    Empty if there are fewer than three different lengths: two lengths may be two possible answers, one of them right.
    """
    products = rewards = lengths = 0.0
    seen = set()
    for group in groups:
        pairs = [(r.reward, r.trajectory.trained_tokens) for r in group.rollouts if r.reward is not None]
        if not pairs:
            continue
        reward, length = (fmean(values) for values in zip(*pairs, strict=True))
        seen |= {tokens for _, tokens in pairs}
        products += sum((value - reward) * (tokens - length) for value, tokens in pairs)
        rewards += sum((value - reward) * (value - reward) for value, _ in pairs)  # overflows to inf; ** would raise
        lengths += sum((tokens - length) ** 2 for _, tokens in pairs)
    return dict(zip(LENGTH_SUMS, (products, rewards, lengths), strict=True)) if len(seen) >= 3 else {}


def length_correlation(steps: Sequence[Numbers]) -> float | None:
    """Pearson's correlation of reward and length within prompts, over all steps together; None if either is constant,
    or if a sum overflows."""
    products, rewards, lengths = (sum(known(steps, name)) for name in LENGTH_SUMS)
    squared = rewards * lengths
    return products / math.sqrt(squared) if squared > 0 and math.isfinite(squared) else None
