"""The report's part on curricula: how many tasks had which solve rate at each step, and which were drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from grpo.config import CurriculumConfig, DataConfig
from grpo.data.curriculum import TENTHS
from grpo.data.pools import POOLS
from grpo.telemetry.plots import stacked
from grpo.telemetry.recorded import RecordedRun

FOLDER = "curriculum/"
SHADES = ("#ddaa33", "#d4b04a", "#c9b562", "#bab97b", "#a8bb92", "#93b9a5", "#7bb2b1", "#62a5b5", "#4c94af", "#3a80a2")
"""From no solved completion to all of them."""
UNSEEN_SHADE = "#dddddd"


def pools_of(runs: Sequence[RecordedRun]) -> str | None:
    """For each run with a curriculum, the histogram of its tasks' solve rates over steps, and the step's draws; with
    `data.sources` of each source that has one."""
    return "".join(_of(run, name, data) for run in runs for name, data in run.recipe.data.parts.items()) or None


def _of(run: RecordedRun, source: str, data: DataConfig) -> str:
    folder = f"{FOLDER}{source}/" if run.recipe.data.sources else FOLDER
    recorded = [record for record in run.steps if f"{folder}unseen" in record.values]
    if not recorded or data.curriculum is None:
        return ""
    steps, values = [record.step for record in recorded], [record.values for record in recorded]
    drawn = {f"{folder}drawn/{pool}": said for pool, said in _pools(data.curriculum).items()}
    rates = stacked(_parts(values, _rates(folder)), steps, "tasks", (*SHADES, UNSEEN_SHADE))
    draws = stacked(_parts(values, drawn), steps, "share")
    heading = f"{run.folder.name}, source {source}" if run.recipe.data.sources else run.folder.name
    return (
        f"<h3>{escape(heading)}</h3><p>Tasks by the solve rate of their latest group:</p>{rates}"
        f"<p>Where the tasks of each step were drawn from:</p>{draws}"
    )


def _parts(values: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> dict[str, list[float]]:
    """Metrics at each step, by what is said of them; 0 where a step has none."""
    return {said: [one.get(name, 0.0) for one in values] for name, said in names.items()}


def _rates(folder: str) -> dict[str, str]:
    """The metrics of the histogram, which begin with `folder`, and which rates each counts."""
    names = [f"{folder}{name.removeprefix(FOLDER)}" for name in TENTHS]
    said = {name: f"{place / len(names):g} to {(place + 1) / len(names):g}" for place, name in enumerate(names)}
    return {**said, f"{folder}unseen": "no rate yet"}


def _pools(cfg: CurriculumConfig) -> dict[str, str]:
    """The pools with the solve rates that each is for."""
    low, high = f"{cfg.hard_threshold:g}", f"{cfg.easy_threshold:g}"
    bounds = {"hard": f"0 to {low}", "normal": f"above {low}, to {high}", "easy": f"above {high}, to 1"}
    return {pool: f"{pool} ({bounds.get(pool, 'no rate yet')})" for pool in POOLS}
