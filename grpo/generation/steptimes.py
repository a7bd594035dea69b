"""The times of steps, by kind of step and by width: the number of tokens that they feed each row."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from grpo.generation.rows import Row

SAMPLES = 3
"""Minimum number of measured steps before the time of a width counts as known."""
RETRY = 1024
"""Number of steps after which the time of a width is out of date."""


class StepKind(NamedTuple):
    """Steps of one kind have similar times: greedy or not, with or without logprobs, slots up to a power of two."""

    greedy: bool
    logprobs: bool
    slots: int

    @classmethod
    def of(cls, rows: Sequence[Row | None]) -> StepKind | None:
        """The kind of a step with these rows in the slots; None if there are no rows."""
        row = next(filter(None, rows), None)
        if row is None:
            return None
        return cls(row.stopping.sampling.temperature == 0, row.wants_logprobs, (len(rows) - 1).bit_length())


@dataclass(slots=True)
class _Times:
    newest: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    at: int = 0

    @property
    def known(self) -> float | None:
        return median(self.newest) if len(self.newest) >= SAMPLES else None


class StepTimes:
    """The median time of the newest steps, by kind and width.

    The time of a wide step is measured in plain steps at that moment, because machines change their speed. A step after
    a step of another width is not counted: it may build kernels, and the host is not yet in step with the device.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._times: dict[tuple[StepKind, int], _Times] = {}
        self._last: dict[tuple[StepKind, int], int] = {}  # the width of the last step, by kind and number of slots

    def add(self, case: StepKind, slots: int, width: int, seconds: float) -> None:
        """Add the time of a step."""
        self.steps += 1
        plain = 1.0 if width == 1 else self.plain(case)
        if self._last.get((case, slots)) == width and plain is not None:
            times = self._times.get((case, width))
            if times is None:
                times = self._times[case, width] = _Times()
            times.newest.append(seconds / plain)
            times.at = self.steps
        self._last[case, slots] = width

    def plain(self, case: StepKind) -> float | None:
        """Seconds per plain step; None if not known."""
        times = self._times.get((case, 1))
        return times.known if times is not None else None

    def plain_age(self, case: StepKind) -> int:
        """The number of steps since a plain step was timed."""
        return self.steps - self._times[case, 1].at

    def cost(self, case: StepKind, width: int) -> float | None:
        """The time of a wide step, in plain steps. None if it was not measured recently."""
        times = self._times.get((case, width))
        return times.known if times is not None and self.steps - times.at <= RETRY else None
