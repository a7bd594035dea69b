"""Applies every rule after each step or evaluation; each kind of alarm is raised once per run."""

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

OF_STEPS: Mapping[str, Rule[StepMetrics]] = {
    "truncation": truncation,
    "failed_calls": failed_calls,
    "no_reward": no_reward,
    "equal_rewards": equal_rewards,
    "no_signal": no_signal,
    "failed_rewards": failed_rewards,
    "entropy": entropy,
    "kl": kl,
    "gradient": gradient,
    "length": length,
    "sampler": sampler,
    "ratios": ratios,
}
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
    signs = {kind: rule(past, record, terms) for kind, rule in rules.items() if kind not in past.told}
    alarms: tuple[Alarm, ...] = tuple(Alarm(kind, record.step, *sign) for kind, sign in signs.items() if sign)
    told = (*past.told, *(alarm.kind for alarm in alarms))
    return replace(record, alarms=alarms), replace(past, told=told)
