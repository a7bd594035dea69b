"""How everything is measured: sides take turns in one process, after a warm-up, and what counts is their ratio.

A comparison's figure is the median of the ratios of single turns, in which both sides met the same machine: what slows
a turn down slows both, and a turn that was disturbed moves a median little. Its interval is the sign test's, between
two of the ratios in order, and asks nothing of their distribution. Every second turn goes backwards, so that a machine
that gets slower (or warmer) favours nobody.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CONFIDENCE, ENOUGH = 0.9, 5
"""That the median lies in its interval, from so many values on; fewer have their lowest and highest, and tell less."""

LOWER_IS_BETTER = frozenset({"s", "ms", "GB", "%"})
"""Units, or their first words: `s rollout` is a part of `s`."""

Values = Mapping[str, float]
"""One run's measurements by unit: `{"tok/s": …, "GB": …}`."""


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do a case's work: `run` does it once and says what it measured.

    It is held against the side named `against`, or else the case's first.
    """

    name: str
    run: Callable[[], Values]
    against: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One side of one case in one unit: its runs, in the order of turns, and the `cold` one before them.

    `ratios` says of each turn how many times better it was than the side it is held against, whichever way the unit
    counts; there are none where there is nothing to hold it against.
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
        """The row for a person."""
        noise = f" ± {number(self.sd)}  spread {100 * self.spread:5.1f} %" if len(self.runs) > 1 else ""
        ratio = ""
        if self.ratio is not None:
            low, high = interval(self.ratios)
            ratio = f"  {self.ratio:.3f} ×" + (f" ({low:.3f} to {high:.3f})" if len(self.ratios) > 1 else "")
        return f"{self.side:<24} {number(self.mean):>10} {self.unit:<14}{noise}  cold {number(self.cold)}{ratio}"


def number(value: float) -> str:
    """With three decimals, or as many figures where it is small."""
    return f"{value:,.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def alternate(case: str, sides: Iterable[Side], runs: int, seconds: float = math.inf) -> list[Measurement]:
    """Warm every side up once, then let them take turns `runs` times, every second turn backwards.

    After so many `seconds` no further side is warmed up: those that were, the first among them, are measured.
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
    """Two of the values between which the median of what they were drawn from lies with probability `CONFIDENCE`.

    Leaving k at each end misses it with probability 2 P(X ≤ k) for X of so many fair coins (sign test; Conover,
    Practical Nonparametric Statistics).
    """
    ordered, n = sorted(series), len(series)
    left, missed = 0, 2 * 0.5**n
    while left + 1 < (n + 1) // 2 and (further := missed + 2 * math.comb(n, left + 1) * 0.5**n) <= 1 - CONFIDENCE:
        left, missed = left + 1, further
    return ordered[left], ordered[n - 1 - left]


def milliseconds(work: Callable[[], object]) -> float:
    """How long a piece of work takes."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)
