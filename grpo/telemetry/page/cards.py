"""The page's summary figures: what training changed and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from grpo.telemetry.recorded import RecordedRun
from grpo.types import EvalMetrics

PART = 0.1
"""The fraction of a run's steps that is averaged for its first reward, and for its last reward."""
RATES = {"none": "no score", "error": "errors", "timeout": "timeouts"}
LOST = {"crash": "crashes", "memory": "too much memory"}
"""Kinds of failure that only environments have, and their headings."""


def cards(run: RecordedRun) -> dict[str, Any]:
    """The summary of a run.

    evaluations   [{"name", "n", "before", "after"}, …], where before and after are {"step", "value", "low", "high"}
                  with 95 % intervals; before is null if there was only one evaluation
    reward        {"before", "after", "steps"}: means of the first and the last `steps` steps; null without rewards
    steps         number of recorded steps
    seconds       duration of all recorded steps, without evaluations and loading
    peak_memory   in GB; null if it was not recorded
    tokens        number of sampled tokens
    silent        number of steps without a signal
    replayed      number of older groups that steps replayed
    failures      number of completions on which a reward or an environment failed, since the start
    """
    peaks, silent = values_of(run, "peak_memory_gb"), values_of(run, "steps_without_signal")
    return {
        "evaluations": _evaluated(run.evaluations),
        "reward": _rewarded(values_of(run, "reward")),
        "steps": len(run.steps),
        "seconds": sum(values_of(run, "step_time")),
        "peak_memory": max(peaks, default=None),
        "tokens": sum(values_of(run, "num_tokens")),
        "silent": max(silent, default=0.0),
        "replayed": sum(values_of(run, "reuse/groups")),
        "failures": sum(max(values_of(run, f"rewards/{name}/failures"), default=0.0) for name in graders(run)),
    }


def _evaluated(made: Sequence[EvalMetrics]) -> list[dict[str, Any]]:
    if not made:
        return []
    first, last = made[0], made[-1]
    return [
        {"name": name, "n": last.n, "before": _at(first, name) if len(made) > 1 else None, "after": _at(last, name)}
        for name in last.values
    ]


def _at(metrics: EvalMetrics, name: str) -> dict[str, Any] | None:
    if name not in metrics.values:
        return None
    low, high = metrics.intervals.get(name, (None, None))
    return {"step": metrics.step, "value": metrics.values[name], "low": low, "high": high}


def _rewarded(rewards: Sequence[float]) -> dict[str, Any] | None:
    if not rewards:
        return None
    steps = max(1, round(PART * len(rewards)))
    return {"before": fmean(rewards[:steps]), "after": fmean(rewards[-steps:]), "steps": steps}


def phases(run: RecordedRun) -> list[list[Any]]:
    """The phases of a run's steps with their total seconds, longest first."""
    names = {name for record in run.steps for name in record.values if is_phase(name)}
    spent = [[name.removeprefix("time/"), sum(values_of(run, name))] for name in sorted(names)]
    return sorted(spent, key=lambda phase: -phase[1])


def is_phase(name: str) -> bool:
    """Whether a metric is the time of a phase (`time/rollout`), rather than of a part (`time/rewards/remote/p50`)."""
    return name.startswith("time/") and name.count("/") == 1


def failures(run: RecordedRun) -> dict[str, Any]:
    """A table with the failures of each reward: the number of failed completions, or conversations for an environment,
    and the mean rate of each kind."""
    known = {name for record in run.steps for name in record.values}
    kinds = RATES | {kind: said for kind, said in LOST.items() if any(name.endswith(f"/{kind}_rate") for name in known)}
    rows = []
    for name in graders(run):
        total = max(values_of(run, f"rewards/{name}/failures"), default=0.0)
        rates = [values_of(run, f"rewards/{name}/{kind}_rate") for kind in kinds]
        rows.append([name, f"{total:.0f}", *(f"{fmean(values):.1%}" if values else "" for values in rates)])
    return {"headings": ["reward", "failures", *kinds.values()], "rows": rows}


def graders(run: RecordedRun) -> list[str]:
    """The names of the recorded rewards and environments."""
    return sorted({name.split("/")[1] for record in run.steps for name in record.values if name.startswith("rewards/")})


def values_of(run: RecordedRun, name: str) -> list[float]:
    """A metric's values at the steps that have the metric."""
    return [record.values[name] for record in run.steps if name in record.values]
