"""The numbers of a record, by the names under which W&B, TensorBoard and Trackio get them."""

from __future__ import annotations

from collections.abc import Callable

from grpo.types import EvalMetrics, Rollout, StepMetrics, Task

Tell = Callable[[str], None]
"""Says a line to the person at the terminal."""


def named_numbers(record: StepMetrics | EvalMetrics) -> dict[str, float]:
    """A step's metrics under `train/`; an evaluation's, and how many of its gradings failed, under `eval/`."""
    if isinstance(record, StepMetrics):
        return {f"train/{name}": value for name, value in record.values.items()}
    values = {**record.values, "failed_gradings": float(record.failed_gradings)}
    return {f"eval/{name}": value for name, value in values.items()}


def best_of(record: StepMetrics) -> tuple[Task, Rollout] | None:
    """The completion with the highest reward that a step sampled, with its task; None if none has a reward."""
    rated = [(g.task, r) for g in record.sampled for r in g.rollouts if r.reward is not None]
    return max(rated, key=lambda pair: pair[1].reward or 0.0, default=None)
