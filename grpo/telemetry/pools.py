"""The report's part on curricula: how many tasks had which solve rate at each step, and which were drawn."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from grpo.config import CurriculumConfig
from grpo.data.pools import POOLS
from grpo.telemetry.plots import stacked
from grpo.telemetry.recorded import RecordedRun

FOLDER = "curriculum/"


def pools_of(runs: Sequence[RecordedRun]) -> str | None:
    """For each run with `data.curriculum`, the histogram of its tasks' solve rates over steps, and the step's draws."""
    return "".join(_of(run) for run in runs) or None


def _of(run: RecordedRun) -> str:
    steps = [record.step for record in run.steps if f"{FOLDER}unseen" in record.values]
    if not steps or run.recipe.data.curriculum is None:
        return ""
    names = _labels(run.recipe.data.curriculum)
    plots = [
        f"<p>{escape(said)}</p>{stacked(_parts(run, names, prefix), steps, unit)}"
        for said, prefix, unit in (
            ("Tasks by the solve rate of their latest group:", FOLDER, "tasks"),
            ("Where the tasks of each step were drawn from:", f"{FOLDER}drawn/", "share"),
        )
    ]
    return f"<h3>{escape(run.folder.name)}</h3>{''.join(plots)}"


def _parts(run: RecordedRun, names: dict[str, str], prefix: str) -> dict[str, list[float]]:
    """What the metrics under a prefix say of each pool at each step."""
    recorded = [record.values for record in run.steps if f"{FOLDER}unseen" in record.values]
    return {label: [values.get(f"{prefix}{pool}", 0.0) for values in recorded] for pool, label in names.items()}


def _labels(cfg: CurriculumConfig) -> dict[str, str]:
    """The pools with the solve rates that each is for."""
    low, high = f"{cfg.hard_threshold:g}", f"{cfg.easy_threshold:g}"
    bounds = {"hard": f"0 to {low}", "normal": f"above {low}, to {high}", "easy": f"above {high}, to 1"}
    return {pool: f"{pool} ({bounds.get(pool, 'no rate yet')})" for pool in POOLS}
