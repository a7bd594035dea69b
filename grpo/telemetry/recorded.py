"""Reads recorded runs: the table of the runs in a folder, and a view that follows one run from another terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo.alarm import Alarm
from grpo.config import Recipe
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import RECIPE
from grpo.runs.folder import ENDED, METRICS, UNTRAINED, WORSE, check_is_run, is_run, is_running
from grpo.telemetry.console import ConsoleLogger, is_fraction, print_wrapped
from grpo.telemetry.jsonl import read_evaluations, read_steps
from grpo.telemetry.progress import read_now
from grpo.types import EvalMetrics, StepMetrics

warn = logging.getLogger(__name__).warning


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run as recorded in its folder."""

    folder: Path
    recipe: Recipe
    steps: list[StepMetrics]
    evaluations: list[EvalMetrics]

    @property
    def step(self) -> int:
        """The last recorded step."""
        return self.steps[-1].step if self.steps else 0

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms of the run, by step."""
        records: list[StepMetrics | EvalMetrics] = [*self.steps, *self.evaluations]
        return sorted((alarm for record in records for alarm in record.alarms), key=lambda alarm: alarm.step)

    @property
    def state(self) -> str:
        """running, finished, untrained (finished, but no step had a signal), worse (finished, but the last evaluation
        is far below the first; without evaluations, the same for rewards), stopped (by a signal), failed (by an
        error), or died (the process ended without recording why)."""
        if is_running(self.folder):
            return "running"
        try:
            word = (self.folder / ENDED).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            word = ""
        if self.step >= self.recipe.optim.steps:
            return word if word in (UNTRAINED, WORSE) else "finished"
        return word if word in ("stopped", "failed") else "died"

    @property
    def best(self) -> EvalMetrics | None:
        """The best evaluation by the recipe's metric, the earliest of equal ones. Step 0 is before training."""
        if self.recipe.eval is None:
            return None
        name = self.recipe.best_metric  # evaluations from before a change of the recipe may lack it
        measured = [evaluation for evaluation in self.evaluations if name in evaluation.values]
        return max(measured, key=lambda evaluation: evaluation.values[name], default=None)


def read_run(folder: Path) -> RecordedRun:
    """A run, read from its folder. Raises UserError for a folder that is not a run."""
    check_is_run(folder)
    return RecordedRun(folder, load_recipe(folder / RECIPE), read_steps(folder), read_evaluations(folder))


def find_runs(folder: Path) -> list[RecordedRun]:
    """The runs in a folder and its subfolders, most recently written first. Warns about runs that cannot be read.

    Raises UserError if the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the folder with your runs")
    found = {path.parent for path in folder.rglob(RECIPE) if not _is_hidden(path, folder) and is_run(path.parent)}
    runs = []
    for path in sorted(found, key=_written, reverse=True):
        try:
            runs.append(read_run(path))
        except UserError as error:
            warn("skipped %s: %s", path, error)
    return runs


def ask_for_a_run(command: str, folder: Path = Path("runs")) -> UserError:
    """The error for `grpo COMMAND` without a run: it names the newest run in `folder`, if there is any."""
    found = find_runs(folder) if folder.is_dir() else []
    if not found:
        return UserError(f"name a run: grpo {command} RUN. There are no runs in {folder}/")
    listed = "" if len(found) == 1 else f"; grpo runs lists all {len(found)}"
    return UserError(f"name a run: grpo {command} {found[0].folder} (the newest in {folder}/{listed})")


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path is in a hidden folder, for example in the folder of a run that is being replaced."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def runs_table(runs: list[RecordedRun]) -> Table:
    """A table with one row per run: state, step, last reward, best evaluation, and time of the last write."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("state", "step", "reward", "best", "written"):
        table.add_column(heading, no_wrap=True)
    for run in runs:
        reward = run.steps[-1].values.get("reward") if run.steps else None
        table.add_row(
            str(run.folder),
            run.state,
            f"{run.step}/{run.recipe.optim.steps}",
            "" if reward is None else f"{reward:.3f}",
            _best(run),
            f"{datetime.fromtimestamp(_written(run.folder)):%m-%d %H:%M}",
        )
    return table


def follow(folder: Path, console: Console, wait: Callable[[], None] = lambda: time.sleep(1)) -> None:
    """Show a run as the run's own terminal does, until it ends. Raises UserError for a folder that is not a run."""
    first, shown = read_run(folder), 0
    seen: list[EvalMetrics] = []
    with ConsoleLogger(console, first.recipe.optim.steps) as logger:
        while True:
            runs_now = is_running(folder)  # checked before reading, so that the last lines of an ended run are read
            run = read_run(folder)
            new: list[StepMetrics | EvalMetrics] = [record for record in run.evaluations if record not in seen]
            seen = run.evaluations
            for record in (*new, *(step for step in run.steps if step.step > shown)):
                logger.log(record)
                for alarm in record.alarms:
                    print_wrapped(console, f"alarm    {alarm}")
            shown = run.step
            if (now := read_now(folder)) is not None:
                logger.progress(*now)
            if not runs_now:
                break
            wait()
    console.print(f"{run.state} after step {run.step}", highlight=False)


def _written(folder: Path) -> float:
    times = []
    for path in (folder / METRICS, folder / RECIPE):
        with suppress(OSError):  # the file does not exist, or no longer exists
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def _best(run: RecordedRun) -> str:
    if run.best is None:
        return ""
    name = run.recipe.best_metric
    value = run.best.values[name]
    return f"{name} {f'{value:.1%}' if is_fraction(name) else f'{value:.3f}'} at step {run.best.step}"
