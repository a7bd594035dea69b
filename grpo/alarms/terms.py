"""The inputs of alarm rules besides the metrics: thresholds and other settings of the recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from grpo.config import AlarmsConfig, LossConfig, OptimConfig, RolloutConfig
from grpo.training.gap import Explained

HELD = "keep the policy near its start with loss.beta: 0.01"


@dataclass(frozen=True, slots=True)
class AlarmTerms:
    """The sections of a recipe that alarm rules use, and values derived from the other sections.

    `weights` has the weight of each reward by name, environments' own rewards included; `environments` has the names of
    the environments. `explained` is the gap between sampler and trainer that rounding explains. `metric` is the metric
    that compares evaluations, None without `eval`. `penalised`: whether a KL penalty keeps the policy near its start.
    """

    alarms: AlarmsConfig
    rollout: RolloutConfig
    loss: LossConfig
    optim: OptimConfig
    weights: Mapping[str, float]
    environments: Collection[str]
    explained: Explained
    metric: str | None = None
    penalised: bool = False

    @property
    def slower(self) -> str:
        """The advice for a model that moves too fast or too far."""
        hold = "" if self.penalised else f", or {HELD}"
        return f"try a lower optim.learning_rate than {self.optim.learning_rate:g}{hold}"


class Sign(NamedTuple):
    """The result of a rule: what happened (no period at the end), and what to do (whole sentences)."""

    what: str
    advice: str
