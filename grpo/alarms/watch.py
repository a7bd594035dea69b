"""Every rule once a step, and every kind of alarm once a run, or once an episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from grpo.alarm import Alarm
from grpo.alarms.evaluation import after_evaluation, overfitting
from grpo.alarms.explosions import entropy, gradient, kl
from grpo.alarms.failures import failed_calls, failed_rewards
from grpo.alarms.lengths import length, truncation
from grpo.alarms.past import PastSteps
from grpo.alarms.sampler import ratios, sampler
from grpo.alarms.signal import equal_rewards, no_reward, no_signal
from grpo.alarms.terms import AlarmTerms, Sign
from grpo.types import EvalMetrics, StepMetrics

Seen = TypeVar("Seen", StepMetrics, EvalMetrics)
Rule = Callable[[PastSteps, Seen, AlarmTerms], Sign | None]

# Causes come before effects: alarms of a step are shown in this order.
OF_STEPS: Mapping[str, Rule[StepMetrics]] = {
    "truncation": truncation,
    "failed_calls": failed_calls,
    "failed_rewards": failed_rewards,
    "no_reward": no_reward,
    "equal_rewards": equal_rewards,
    "no_signal": no_signal,
    "entropy": entropy,
    "kl": kl,
    "gradient": gradient,
    "length": length,
    "sampler": sampler,
    "ratios": ratios,
}
EPISODES = ("failed_rewards", "failed_calls")
"""Kinds of alarm about code that fails. They are reported again for a new episode: a service that failed once may fail
again for another reason."""
APART = 25
"""Steps from one report of such a kind to the next, at least."""
OF_EVALUATIONS: Mapping[str, Rule[EvalMetrics]] = {"overfitting": overfitting}


def after_step(metrics: StepMetrics, past: PastSteps, terms: AlarmTerms | None) -> tuple[StepMetrics, PastSteps]:
    """The step's record with its alarms, and the history with the step. Without terms (`alarms: off`), both are
    returned unchanged."""
    return (metrics, past) if terms is None else _told(metrics, past.after(metrics), OF_STEPS, terms)


def after_measuring(metrics: EvalMetrics, past: PastSteps, terms: AlarmTerms | None) -> tuple[EvalMetrics, PastSteps]:
    """The evaluation's record with its alarms, and the updated history; see `after_step`."""
    if terms is None:
        return metrics, past
    return _told(metrics, after_evaluation(past, metrics, terms), OF_EVALUATIONS, terms)


def _told(record: Seen, past: PastSteps, rules: Mapping[str, Rule[Seen]], terms: AlarmTerms) -> tuple[Seen, PastSteps]:
    open_rules = {kind: rule for kind, rule in rules.items() if kind not in past.told or kind in EPISODES}
    signs = {kind: rule(past, record, terms) for kind, rule in open_rules.items()}
    over = {kind for kind in past.told if kind in past.over or (kind in signs and signs[kind] is None)}
    new = {kind: sign for kind, sign in signs.items() if sign and _is_new(kind, record.step, past)}
    alarms: tuple[Alarm, ...] = tuple(Alarm(kind, record.step, *sign) for kind, sign in new.items())
    told = {**past.told, **dict.fromkeys(new, record.step)}
    return replace(record, alarms=alarms), replace(past, told=told, over=tuple(sorted(over - new.keys())))


def _is_new(kind: str, step: int, past: PastSteps) -> bool:
    """Whether a kind was never reported, or an episode of it ended since and the report is long ago."""
    return kind not in past.told or (kind in past.over and step - past.told[kind] >= APART)
