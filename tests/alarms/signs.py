"""Runs that go wrong, as the numbers of their steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx

from grpo.alarm import Alarm
from grpo.alarms.past import PastSteps
from grpo.alarms.terms import AlarmTerms
from grpo.alarms.watch import after_step
from grpo.config import AlarmsConfig, LossConfig, OptimConfig, RolloutConfig
from grpo.training.gap import Explained
from grpo.types import StepMetrics


def terms(alarms: AlarmsConfig | None = None, **how) -> AlarmTerms:
    """The terms of a float32 run of 99 steps with one reward."""
    policy = SimpleNamespace(dtype=mx.float32, temperature=1.0)
    made = AlarmTerms(
        alarms or AlarmsConfig(),
        RolloutConfig(),
        LossConfig(),
        OptimConfig(steps=99),
        {"exact": 1.0},
        (),
        Explained.of(policy),
        "avg@4",
    )
    return replace(made, **how)


def watched(
    steps: Iterable[Mapping[str, float] | StepMetrics], known: AlarmTerms | None = None, past: PastSteps | None = None
) -> tuple[list[Alarm], PastSteps]:
    """The alarms of steps that follow one another, and the past that they leave. Each has a reward."""
    alarms, past, known = [], past or PastSteps(), known or terms()
    for number, values in enumerate(steps, 1):
        record = values if isinstance(values, StepMetrics) else StepMetrics(number, values)
        record = replace(record, values={"reward": 0.5, "frac_reward_zero_std": 0.5, **record.values})
        record, past = after_step(record, past, known)
        alarms += record.alarms
    return alarms, past
