"""Means over seeds with their 95 % intervals, and learning curves side by side."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Protocol

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""The 97.5 % quantile of Student's t for the mean over N seeds (N - 1 degrees of freedom), by N."""


class Curve(Protocol):
    """The learning curve of one arm and seed: its accuracy after each of these steps."""

    arm: str
    seed: int
    steps: list[int]
    accuracy: list[float]


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds, and half of its 95 % interval by Student's t; None for a single seed.

    With three seeds the interval is wide, because it assumes nothing about the variance between seeds.
    """
    if len(values) == 1:
        return values[0], None
    return fmean(values), STUDENT_T[len(values)] * stdev(values) / len(values) ** 0.5


def cell(values: Sequence[float]) -> str:
    """Fractions over seeds in percent: their mean and half of its interval."""
    mean, half = mean_and_half_width([100 * value for value in values])
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"


def curves(runs: Sequence[Curve]) -> str:
    """A Markdown table: the accuracy of each arm at each step, and the differences from the first arm, seed by seed.
    The last row has the means over steps. Seeds that an arm lacks are left out."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    by_seed = [{run.seed: run for run in runs if run.arm == arm} for arm in arms]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    paths = [[found[seed].accuracy for seed in seeds] for found in by_seed]  # by arm and seed
    steps = by_seed[0][seeds[0]].steps
    rows = [_row(str(step), [[path[at] for path in mine] for mine in paths]) for at, step in enumerate(steps)]
    rows.append(_row("mean", [[fmean(path) for path in mine] for mine in paths]))
    heads = ["step", *arms, *(f"{arm} - {arms[0]}" for arm in arms[1:])]
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows]) + "\n"


def _row(name: str, values: Sequence[Sequence[float]]) -> str:
    """A row of the table; `values` are by arm and seed."""
    first, *others = values
    differences = [[b - a for a, b in zip(first, other, strict=True)] for other in others]
    return f"| {name} | {' | '.join(map(cell, [*values, *differences]))} |"
