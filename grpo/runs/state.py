"""What a run is between two steps, beside its recipe: all that it needs to go on as if it had never been stopped.

Whatever else a run does is a function of the recipe and the step: schedules, draws, the shuffle of an epoch.
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
    """The best evaluation so far: after which step, and what it measured."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class RunState:
    """A run after `step`: the trainer's state, the evaluations it compares, and the id that W&B knows it by.

    `first` is the first step that its folder has on record: of a branch off another run, not that run's. `rewarded`:
    whether any completion of its steps had a reward. `rewards`: the mean reward of each step that had one, since
    what is asked, how it is answered, or how it is scored was last changed. `start`: the lower end of the
    interval of the first of them, which is of the model before any update. `past` is what alarms look back on,
    and which of them were told.
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
        """All but the arrays, as JSON holds it."""
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
        """What `plain` was taken of, with its arrays."""
        return cls(
            step=plain["step"],
            first=plain["first"],
            rewarded=plain.get("rewarded", True),  # not in older checkpoints
            rewards=tuple(plain.get("rewards", ())),  # nor are these
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
