"""The measurement protocol: after a warm-up, sides take turns in one process, and the result is their ratio.

A comparison's figure is the median of the ratios of single turns. Within a turn, both sides run under the same
conditions: whatever slows the machine slows both, and one disturbed turn hardly moves the median. The interval is the
sign test's, between two of the sorted ratios, and assumes nothing about their distribution. Every second turn runs in
reverse order, so that a machine that becomes slower (or warmer) favors no side.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CONFIDENCE, ENOUGH = 0.9, 5
"""Probability that an interval of at least `ENOUGH` values contains the median. The interval of fewer values is their
minimum and maximum, with a lower probability."""

LOWER_IS_BETTER = frozenset({"s", "ms", "GB", "%"})
"""Units, or first words of units: `s rollout` is a part of `s`."""

Values = Mapping[str, float]
"""The measurements of one run by unit: `{"tok/s": …, "GB": …}`."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a case: `run` does the work once and returns its measurements.

    It is compared with the side named `against`, by default the case's first side.
    """

    name: str
    run: Callable[[], Values]
    against: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One side of one case in one unit: its runs, in the order of turns, and the `cold` run before them.

    `ratios` says for each turn how many times better this side was than the side it is compared with, in a unit where
    lower is better, too. It is empty for a side that is not compared.
    """

    case: str
    side: str
    unit: str
    runs: tuple[float, ...]
    cold: float
    ratios: tuple[float, ...] = field(default=())

    @property
    def mean(self) -> float:
        return statistics.fmean(self.runs)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.runs) if len(self.runs) > 1 else 0.0

    @property
    def spread(self) -> float:
        """(max - min) / mean."""
        return (max(self.runs) - min(self.runs)) / self.mean if self.mean else 0.0

    @property
    def ratio(self) -> float | None:
        """The median of the turns' ratios."""
        return statistics.median(self.ratios) if self.ratios else None

    def line(self) -> str:
        """The row as text."""
        noise = f" ± {number(self.sd)}  spread {100 * self.spread:5.1f} %" if len(self.runs) > 1 else ""
        ratio = ""
        if self.ratio is not None:
            low, high = interval(self.ratios)
            ratio = f"  {self.ratio:.3f} ×" + (f" ({low:.3f} to {high:.3f})" if len(self.ratios) > 1 else "")
        return f"{self.side:<24} {number(self.mean):>10} {self.unit:<14}{noise}  cold {number(self.cold)}{ratio}"


def number(value: float) -> str:
    """The value with three decimals; with three significant digits if it is below 0.1."""
    return f"{value:,.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def alternate(case: str, sides: Iterable[Side], runs: int, seconds: float = math.inf) -> list[Measurement]:
    """Warm up every side once, then run all sides in turns `runs` times, every second turn in reverse order.

    After `seconds`, no further side is warmed up: only the sides that were, at least the first, are measured.
    """
    started = time.perf_counter()
    warm: list[tuple[Side, Values]] = []
    for side in sides:
        if warm and time.perf_counter() - started > seconds:
            break
        warm.append((side, side.run()))
    turns = [_turn([side for side, _ in warm], backwards=number % 2 == 1) for number in range(runs)]
    rows = []
    for side, cold in warm:
        base = side.against or warm[0][0].name
        for unit, first in cold.items():
            series = tuple(turn[side.name][unit] for turn in turns)
            pairs = [(turn[side.name][unit], turn[base].get(unit, 0.0)) for turn in turns]
            compared = base != side.name and all(mine and theirs for mine, theirs in pairs)
            ratios = tuple(_ratio(unit, mine, theirs) for mine, theirs in pairs) if compared else ()
            rows.append(Measurement(case, side.name, unit, series, first, ratios))
    return rows


def _turn(sides: Sequence[Side], backwards: bool) -> dict[str, Values]:
    return {side.name: side.run() for side in (reversed(sides) if backwards else sides)}


def _ratio(unit: str, mine: float, theirs: float) -> float:
    better, worse = (theirs, mine) if unit.split()[0] in LOWER_IS_BETTER else (mine, theirs)
    return better / worse


def interval(series: Sequence[float]) -> tuple[float, float]:
    """Two of the values, between which the median of their distribution lies with probability `CONFIDENCE`.

    Dropping k values at each end misses the median with probability 2 P(X ≤ k), where X is the number of heads in
    n fair coin tosses (sign test; Conover, Practical Nonparametric Statistics).
    """
    ordered, n = sorted(series), len(series)
    left, missed = 0, 2 * 0.5**n
    while left + 1 < (n + 1) // 2 and (further := missed + 2 * math.comb(n, left + 1) * 0.5**n) <= 1 - CONFIDENCE:
        left, missed = left + 1, further
    return ordered[left], ordered[n - 1 - left]


def milliseconds(work: Callable[[], object]) -> float:
    """The duration of a function call in milliseconds."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)
