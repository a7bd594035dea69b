"""The data of the report's page: the content of runs' folders as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.telemetry.page.browsed import browsed
from grpo.telemetry.page.cards import cards, failures, phases
from grpo.telemetry.page.layout import layout
from grpo.telemetry.page.settings import settings
from grpo.telemetry.page.text import PageJson, number
from grpo.telemetry.recorded import RecordedRun

FORMAT = 1
"""The version of the contract in `page_data`. A page and its data are always made by the same version of grpo."""
MOST_POINTS = 200_000
"""Maximum number of metric values in a page, over all runs: less than 2 MB."""


def page_data(runs: Sequence[RecordedRun], completions: bool = True) -> PageJson:
    """Everything that the page shows, as JSON values (no NaN, no infinity).

    The page reads this object from the block `<script id="data">` that `grpo.telemetry.report.page` writes. With a live
    address, the page fetches the object repeatedly and shows the changes: zoom, filters and open rows stay. The object:

        format   1
        title    of the page
        plots    the plots in order, as `layout` describes them
        runs     a list of runs, in the order of their colors:
            name          unique in the page
            state         `RecordedRun.state`, such as "running"
            step, steps   the last recorded step, and the number of steps in the recipe
            now           progress of the current phase, as text; only while `grpo watch` shows a running run
            settings      [[heading, text], …]: the main settings
            cards         summary figures, see `cards`
            x             the steps of the metrics' values
            every         number of steps per value: above 1 in a long run, whose values are means
            metrics       {name: [value or null, …]}, along x
            phases        [[name, total seconds], …], longest first
            evaluations   {"x": steps, "n": prompts, "grader": name, "values": {name: {"value": […], "low": […], "high":
                          […]}}} with 95 % intervals; null without evaluations
            alarms        [[step, kind, what happened, what to do], …], see `grpo.alarm`
            failures      {"headings": […], "rows": [[…], …]}
            completions   a selection, see `browsed`; null if none are stored. With `completions=False` it is absent,
                          and the page keeps its old completions: reading them takes longer than everything else.

    Values are rounded to 5 significant digits. The size is bounded, whatever the runs' lengths: 1,000 steps take less
    than 5 MB.
    """
    names = _names([run.folder for run in runs])
    total = sum(len(run.steps) * len(_metric_names(run)) for run in runs)
    every = max(1, math.ceil(total / MOST_POINTS))
    return {
        "format": FORMAT,
        "title": "GRPO: " + ", ".join(names),
        "plots": layout(runs),
        "runs": [
            _of_run(run, name, every) | ({"completions": browsed(run, len(runs))} if completions else {})
            for run, name in zip(runs, names, strict=True)
        ],
    }


def _of_run(run: RecordedRun, name: str, every: int) -> PageJson:
    steps = [record.step for record in run.steps]
    return {
        "name": name,
        "state": run.state,
        "step": run.step,
        "steps": run.recipe.optim.steps,
        "settings": settings(run),
        "cards": _plain(cards(run)),
        "x": steps[every - 1 :: every] + (steps[-1:] if len(steps) % every else []),
        "every": every,
        "metrics": {
            metric: _thinned([record.values.get(metric) for record in run.steps], every)
            for metric in _metric_names(run)
        },
        "phases": _plain(phases(run)),
        "evaluations": _evaluations(run),
        "alarms": [[alarm.step, alarm.kind, alarm.what, alarm.advice] for alarm in run.alarms],
        "failures": failures(run),
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """A unique name for each folder: its last part, or the given path if two folders have the same last part."""
    last = [folder.resolve().name for folder in folders]
    named = [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]
    return [name if named.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(named)]


def _metric_names(run: RecordedRun) -> list[str]:
    return sorted({name for record in run.steps for name in record.values})


def _thinned(values: Sequence[float | None], every: int) -> list[float | None]:
    """The mean of each `every` consecutive values, ignoring missing values."""
    means = []
    for start in range(0, len(values), every):
        known = [value for value in values[start : start + every] if value is not None]
        means.append(number(fmean(known)) if known else None)
    return means


def _evaluations(run: RecordedRun) -> PageJson | None:
    made = run.evaluations
    if not made:
        return None
    names = dict.fromkeys(name for evaluation in made for name in evaluation.values)
    none = (None, None)
    return {
        "x": [evaluation.step for evaluation in made],
        "n": made[-1].n,
        "grader": made[-1].grader,
        "values": {
            name: {
                "value": [number(evaluation.values.get(name)) for evaluation in made],
                "low": [number(evaluation.intervals.get(name, none)[0]) for evaluation in made],
                "high": [number(evaluation.intervals.get(name, none)[1]) for evaluation in made],
            }
            for name in names
        },
    }


def _plain(value: Any) -> Any:
    """The same value with every float rounded."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return number(value) if isinstance(value, float) else value
