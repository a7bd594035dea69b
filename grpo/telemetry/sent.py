"""The numbers of a record, by the names under which W&B and TensorBoard get them."""

from __future__ import annotations

from grpo.types import EvalMetrics, StepMetrics


def named_numbers(record: StepMetrics | EvalMetrics) -> dict[str, float]:
    """A step's metrics under `train/`; an evaluation's, and how many of its gradings failed, under `eval/`."""
    if isinstance(record, StepMetrics):
        return {f"train/{name}": value for name, value in record.values.items()}
    values = {**record.values, "failed_gradings": float(record.failed_gradings)}
    return {f"eval/{name}": value for name, value in values.items()}
