"""Compares measurements with bounds.

A figure is the median of the turns' figures, with an interval (`protocol.interval`). It falls short only if the whole
interval is beyond the bound; if the bound is inside the interval, the runs do not decide. So noise fails a bound that
holds at most once in twenty times; on a machine that is too noisy, use more `--runs`. "No slower" is an overhead of at
most 0, judged in the same way.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grpo.benchmark.bounds import Bound
from grpo.benchmark.protocol import ENOUGH, Measurement, interval


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bound compared with a row: the median of the turns' figures, and its interval."""

    bound: Bound
    row: Measurement
    figure: float
    low: float
    high: float

    @property
    def enough(self) -> bool:
        """Whether there were enough turns for a verdict."""
        return len(self.row.runs) >= ENOUGH

    @property
    def falls_short(self) -> bool:
        if not self.enough:
            return False
        return self.high < self.bound.least or self.low > self.bound.most

    @property
    def holds(self) -> bool:
        return self.enough and self.bound.least <= self.low and self.high <= self.bound.most

    def line(self) -> str:
        """The verdict as text."""
        unsure = "within the noise" if self.enough else f"undecided: fewer than {ENOUGH} runs"
        word = "FALLS SHORT" if self.falls_short else "holds" if self.holds else unsure
        unit = f" {self.row.unit}" if self.bound.figure == "value" else ""
        figures = f"{self._text(self.figure)} ({self._text(self.low)} to {self._text(self.high)}){unit}"
        ends = (("at least", self.bound.least), ("at most", self.bound.most))
        limits = " and ".join(f"{name} {self._text(end)}" for name, end in ends if math.isfinite(end))
        return f"{self.row.case}: {self.row.side}: {self.bound.figure} {figures}, bound {limits}: {word}"

    def _text(self, value: float) -> str:
        if self.bound.figure == "overhead":
            return f"{100 * value:.1f} %"
        return f"{value:.2f} ×" if self.bound.figure == "speed-up" else f"{value:.3g}"


def judge(bounds: Iterable[Bound], rows: Sequence[Measurement]) -> list[Verdict]:
    """The verdicts of every bound on every row that it matches, if the row has the bound's figure."""
    verdicts = []
    for bound in bounds:
        for row in rows:
            if bound.matches(row) and (figures := bound.figures(row)):
                verdicts.append(Verdict(bound, row, statistics.median(figures), *interval(figures)))
    return verdicts
