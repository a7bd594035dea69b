"""The state of a run between two steps: with the recipe, all that it needs to resume as if it had never stopped.

Everything else is a function of the recipe and the step: schedules, random draws, the shuffling of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from grpo.alarm import Alarm
from grpo.alarms.past import PastSteps
from grpo.training.state import Arrays, TrainerState
from grpo.types import EvalMetrics


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: its step, and its value of `checkpoint.metric_for_best_model`."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run after `step`.

    run_id    id of the run, also in W&B
    trainer   the trainer's state
    first     first step on record in the run's folder; in a branch off another run, the step after the branch point
    rewarded  whether any completion so far had a reward
    rewards   mean reward of each step that had one, since model, tasks, sampling or rewards last changed
    start     lower end of the interval of the first step's mean reward, which is the untrained model's
    before    first evaluation
    after     newest evaluation
    best      best evaluation
    past      what alarms look back on, and which alarms have been reported
    """

    run_id: str
    trainer: TrainerState
    step: int = 0
    first: int = 1
    rewarded: bool = False
    rewards: tuple[float, ...] = ()
    start: float | None = None
    before: EvalMetrics | None = None
    after: EvalMetrics | None = None
    best: Best | None = None
    past: PastSteps = field(default_factory=PastSteps)

    def plain(self) -> dict[str, Any]:
        """Everything except the arrays, as data for JSON."""
        return {
            "step": self.step,
            "first": self.first,
            "rewarded": self.rewarded,
            "rewards": list(self.rewards),
            "start": self.start,
            "run_id": self.run_id,
            "counts": dict(self.trainer.counts),
            "before": self.before and asdict(self.before),
            "after": self.after and asdict(self.after),
            "best": self.best and asdict(self.best),
            "past": self.past.plain(),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any], arrays: Mapping[str, Arrays]) -> RunState:
        """The state whose `plain()` is `plain`, with its arrays."""
        return cls(
            step=plain["step"],
            first=plain["first"],
            rewarded=plain.get("rewarded", True),  # not in older checkpoints
            rewards=tuple(plain.get("rewards", ())),  # not in older checkpoints
            start=plain.get("start"),
            run_id=plain["run_id"],
            trainer=TrainerState(arrays, plain["counts"]),
            before=_evaluation(plain["before"]),
            after=_evaluation(plain["after"]),
            best=plain["best"] and Best(**plain["best"]),
            past=PastSteps.of(plain.get("past")),  # not in older checkpoints
        )


def _evaluation(plain: Mapping[str, Any] | None) -> EvalMetrics | None:
    if plain is None:
        return None
    intervals = {name: (low, high) for name, (low, high) in plain["intervals"].items()}
    alarms = tuple(Alarm(**alarm) for alarm in plain.get("alarms", ()))  # not in older checkpoints
    return EvalMetrics(**{**plain, "intervals": intervals, "alarms": alarms})
