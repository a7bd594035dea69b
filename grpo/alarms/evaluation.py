"""The alarm about a reward that rises while the evaluation falls: the model learns the reward instead of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from statistics import fmean, stdev

from grpo.alarms.past import BestMeasured, PastSteps, known
from grpo.alarms.terms import AlarmTerms, Sign
from grpo.evaluation.evaluator import hidden_by_failures, wilson_interval
from grpo.types import EvalMetrics

FEW = 20
"""Minimum number of prompts for a bootstrap interval: with few prompts it may have width 0, if all values are equal."""
STEPS = 10
"""Number of steps whose mean reward is compared."""


def interval_of(metrics: EvalMetrics, name: str) -> tuple[float, float] | None:
    """A metric's 95 % interval, at least as wide as Wilson's for a fraction; None for a mean over too few prompts."""
    low, high = metrics.intervals[name]
    if name.startswith("rewards/"):
        return (low, high) if metrics.n >= FEW else None
    least, most = wilson_interval(metrics.values[name] * metrics.n, metrics.n)
    return min(low, least), max(high, most)


def after_evaluation(past: PastSteps, metrics: EvalMetrics, terms: AlarmTerms) -> PastSteps:
    """The history, in which the evaluation replaces the best evaluation if it is better."""
    name = terms.metric
    if name is None or name not in metrics.values or (interval := interval_of(metrics, name)) is None:
        return past
    value = metrics.values[name]
    if past.best is not None and past.best.value >= value:
        return past
    rewards = tuple(past.last("reward", STEPS))
    return replace(past, best=BestMeasured(metrics.step, value, interval[0], rewards))


def overfitting(past: PastSteps, metrics: EvalMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if the evaluation is below the best one by more than the intervals, and the training reward has risen
    since then."""
    most, name, best = terms.alarms.eval_drop, terms.metric, past.best
    if most is None or name is None or best is None or name not in metrics.values:
        return None
    if metrics.step <= best.step or (interval := interval_of(metrics, name)) is None:
        return None
    value = metrics.values[name] + hidden_by_failures(metrics, name)
    if best.value - value <= most * ((best.value - best.low) + (interval[1] - metrics.values[name])):
        return None
    before = best.rewards or tuple(known(past.first, "reward"))  # no rewards precede the evaluation at step 0
    now = past.last("reward", min(STEPS, metrics.step - best.step))
    if not (before and now) or fmean(now) - fmean(before) <= _noise(before) + _noise(now):
        return None
    return Sign(
        f"the reward rose from {fmean(before):.3f} to {fmean(now):.3f} while eval/{name} fell from {best.value:.3f} "
        f"(step {best.step}) to {metrics.values[name]:.3f}",
        "The model games the reward, or memorizes the training prompts. Read completions with a high reward: if their "
        f"answers are wrong, fix the reward. If not, use more prompts, or {terms.slower}. grpo keeps the best "
        "checkpoint (grpo export RUN --checkpoint best).",
    )


def _noise(values: Sequence[float]) -> float:
    """Half the width of a 95 % interval of a mean."""
    return 1.96 * stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
