"""How long steps take: by the slots, by the tokens that they feed each row, and by what they compute of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from grpo.generation.rows import Row

SAMPLES = 3
"""Measured steps without which nothing is known of a width."""
RETRY = 1024
"""Steps after which the time of a wide step is no longer believed."""


class StepKind(NamedTuple):
    """What steps are alike: greedy or not, with logprobs or not, and the number of slots, by powers of two."""

    greedy: bool
    logprobs: bool
    slots: int

    @classmethod
    def of(cls, rows: Sequence[Row | None]) -> StepKind | None:
        """The case of the rows in slots; None without any."""
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
    """The median time of the newest steps, by case and width.

    Those of wide steps are in plain steps of the same time, because machines change their speed.
    A step after one of another width is not counted: it may build kernels, and it comes out of step with the device.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._times: dict[tuple[StepKind, int], _Times] = {}
        self._last: dict[tuple[StepKind, int], int] = {}  # the width of the step before, by case and number of slots

    def add(self, case: StepKind, slots: int, width: int, seconds: float) -> None:
        """Count a step."""
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
        """Seconds of a plain step, if they are known."""
        times = self._times.get((case, 1))
        return times.known if times is not None else None

    def plain_age(self, case: StepKind) -> int:
        """Steps since a plain one was timed."""
        return self.steps - self._times[case, 1].at

    def cost(self, case: StepKind, width: int) -> float | None:
        """The time of a wide step, measured in plain ones. None if it was not measured of late."""
        times = self._times.get((case, width))
        return times.known if times is not None and self.steps - times.at <= RETRY else None
