"""The parts of a record that W&B, TensorBoard and Trackio get: numbers by name, and the best completion."""

from __future__ import annotations

from collections.abc import Callable

from grpo.types import EvalMetrics, Rollout, StepMetrics, Task

Tell = Callable[[str], None]
"""Prints a line on the terminal."""


def named_numbers(record: StepMetrics | EvalMetrics) -> dict[str, float]:
    """A step's metrics under `train/`; an evaluation's metrics and number of failed gradings under `eval/`."""
    if isinstance(record, StepMetrics):
        return {f"train/{name}": value for name, value in record.values.items()}
    values = {**record.values, "failed_gradings": float(record.failed_gradings)}
    return {f"eval/{name}": value for name, value in values.items()}


def best_of(record: StepMetrics) -> tuple[Task, Rollout] | None:
    """The step's completion with the highest reward, with its task; None if no completion has a reward."""
    rated = [(g.task, r) for g in record.sampled for r in g.rollouts if r.reward is not None]
    return max(rated, key=lambda pair: pair[1].reward or 0.0, default=None)
