"""What a run is between two steps, beside its recipe: all that it needs to go on as if it had never been stopped.

Whatever else a run does is a function of the recipe and the step: schedules, draws, the shuffle of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from grpo.errors import UserError
from grpo.model.adapters import REFERENCE
from grpo.types import EvalMetrics

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What training changes.

    `arrays` by file and path, in the dtypes they train in: `adapters`, and the `optimizer`'s step and moments. `counts`
    is what rooms count, as JSON holds it: the `tasks`' cursor, and what the `scorer` has seen of failures.
    """

    arrays: Mapping[str, Arrays]
    counts: Mapping[str, Any]

    def check_fits(self, other: TrainerState) -> None:
        """Raise UserError if this is not a state of the trainer that `other` is a state of.

        It may lack the reference: a run that never asked for it has not moved it, so it is what it was at the start.
        """
        for name, arrays in other.arrays.items():
            if name == REFERENCE and name not in self.arrays:
                continue
            mine = {path: array.shape for path, array in self.arrays.get(name, {}).items()}
            if mine != {path: array.shape for path, array in arrays.items()}:
                raise UserError(f"resume: the checkpoint's {name}: other arrays or shapes than this recipe's")


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: after which step, and what it measured."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class RunState:
    """A run after `step`: the trainer's state, the evaluations it compares, and the id that W&B knows it by.

    `first` is the first step that its folder has on record: of a branch off another run, not that run's.
    """

    run_id: str
    trainer: TrainerState
    step: int = 0
    first: int = 1
    before: EvalMetrics | None = None
    after: EvalMetrics | None = None
    best: Best | None = None

    def plain(self) -> dict[str, Any]:
        """All but the arrays, as JSON holds it."""
        return {
            "step": self.step,
            "first": self.first,
            "run_id": self.run_id,
            "counts": dict(self.trainer.counts),
            "before": self.before and asdict(self.before),
            "after": self.after and asdict(self.after),
            "best": self.best and asdict(self.best),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any], arrays: Mapping[str, Arrays]) -> RunState:
        """What `plain` was taken of, with its arrays."""
        return cls(
            step=plain["step"],
            first=plain["first"],
            run_id=plain["run_id"],
            trainer=TrainerState(arrays, plain["counts"]),
            before=_evaluation(plain["before"]),
            after=_evaluation(plain["after"]),
            best=plain["best"] and Best(**plain["best"]),
        )


def _evaluation(plain: Mapping[str, Any] | None) -> EvalMetrics | None:
    if plain is None:
        return None
    intervals = {name: (low, high) for name, (low, high) in plain["intervals"].items()}
    return EvalMetrics(**{**plain, "intervals": intervals})
