"""Solve rates and pools of tasks: weighted draws, and compact storage."""

from __future__ import annotations

import math
import zlib
from array import array
from base64 import b64decode, b64encode
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from grpo.config import CurriculumConfig

POOLS = ("hard", "normal", "easy", "unseen")
UNSEEN, LEFT_OUT = -1.0, -2.0
"""Stored instead of a rate: for a task that was never sampled, and for a row without a task."""
_UNSEEN, _LEFT_OUT = 3, 4
"""Pool numbers of these two. The pools with rates are 0, 1 and 2, as in `POOLS`."""
BINS = 10
"""Bars of the histogram of solve rates."""
CHUNK = 1024
"""Rows whose rates are packed together. A draw reads the weights of all chunks, and the rows of one chunk."""


class Pools:
    """The solve rates of `size` tasks by index, float32 in [0, 1], and draws weighted by pool.

    Draws depend only on the rates, not on the order in which they were set: so a table that was packed and loaded draws
    the same tasks. Takes 4 bytes per task, and less than 6 for the packed text.
    """

    def __init__(self, size: int, cfg: CurriculumConfig) -> None:
        self._rates = array("f", [UNSEEN]) * size
        # The thresholds are rounded to float32 like the rates, so that 3 of 10 is not above 0.3.
        self._edges = tuple(array("f", [cfg.hard_threshold, cfg.easy_threshold]))
        self._weights = (cfg.hard, cfg.normal, cfg.easy, cfg.unseen, 0.0)
        chunks = -(-size // CHUNK)
        self._counts = self._counted(self._rates)
        self._packed: list[str | None] = [""] * chunks  # None: changed since it was packed
        self._sums: list[float] | None = None

    def __len__(self) -> int:
        return len(self._rates)

    def sizes(self) -> dict[str, int]:
        """Number of tasks in each pool. Rows without a task are in no pool."""
        return {pool: sum(counts[number] for counts in self._counts) for number, pool in enumerate(POOLS)}

    def histogram(self) -> list[int]:
        """Number of tasks with a solve rate in each tenth from 0 to 1. A rate on an edge counts in the higher tenth."""
        rates = np.frombuffer(self._rates, np.float32)
        tenths = (rates[rates >= 0] * BINS + 1e-4).astype(np.int64)  # float32 rounds 0.7 down a little
        counted: list[int] = np.bincount(np.minimum(tenths, BINS - 1), minlength=BINS).tolist()
        return counted

    @property
    def left_out(self) -> int:
        """Number of rows without a task."""
        return sum(counts[_LEFT_OUT] for counts in self._counts)

    def rate(self, index: int) -> float | None:
        """A task's solve rate; None if it has none."""
        return None if (rate := self._rates[index]) < 0 else rate

    def pool(self, index: int) -> str:
        """The pool that a task is in."""
        return POOLS[self._number(self._rates[index])]

    def put(self, index: int, rate: float) -> None:
        """Set a task's solve rate, or `LEFT_OUT`."""
        chunk = index // CHUNK
        counts = self._counts[chunk]
        counts[self._number(self._rates[index])] -= 1
        self._rates[index] = rate
        counts[self._number(self._rates[index])] += 1
        self._packed[chunk] = self._sums = None

    def begin(self, rates: npt.NDArray[np.float64]) -> None:
        """Set the rates of all tasks. NaN means that a task was never sampled."""
        self._take(np.where(np.isnan(rates), UNSEEN, rates).astype(np.float32))
        self._packed = [None] * len(self._packed)

    def draw(self, at: float) -> int | None:
        """The task at the position `at`, 0 ≤ `at` < 1, in the cumulative weights of all tasks; None if all are 0."""
        if self._sums is None:
            self._sums = list(accumulate(map(self._weight, self._counts)))
        if not self._sums[-1]:
            return None
        place = at * self._sums[-1]
        chunk = _at(self._sums, place)
        rates = self._rates[chunk * CHUNK : (chunk + 1) * CHUNK]
        rows = list(accumulate(self._weights[self._number(rate)] for rate in rates))
        return chunk * CHUNK + _at(rows, place - (self._sums[chunk - 1] if chunk else 0.0))

    def packed(self) -> list[str]:
        """All rates as text, chunk by chunk, "" for a chunk of unseen tasks. Only changed chunks are packed again."""
        packed = [self._pack(chunk) if text is None else text for chunk, text in enumerate(self._packed)]
        self._packed = [*packed]
        return packed

    def load(self, packed: Sequence[str]) -> None:
        """Set the rates from the result of `packed`, of a table with the same size."""
        unseen = np.full(CHUNK, UNSEEN, np.float32)
        parts = [np.frombuffer(zlib.decompress(b64decode(text)), np.float32) if text else unseen for text in packed]
        self._take(np.concatenate(parts)[: len(self)])  # the last chunk is shorter
        self._packed = [*packed]

    def _take(self, rates: npt.NDArray[np.float32]) -> None:
        self._rates = array("f", rates.tobytes())
        self._counts, self._sums = self._counted(self._rates), None

    def _counted(self, rates: array[float]) -> list[list[int]]:
        """Number of tasks of each chunk in each pool: `[chunks][5]`."""
        table = np.frombuffer(rates, np.float32)
        numbers = np.searchsorted(np.array(self._edges, np.float32), table)  # `_number`, vectorized
        numbers = np.where(table >= 0, numbers, np.where(table == UNSEEN, _UNSEEN, _LEFT_OUT))
        kinds, chunks = _LEFT_OUT + 1, -(-len(table) // CHUNK)
        places = np.arange(len(table)) // CHUNK * kinds + numbers
        counted: list[list[int]] = np.bincount(places, minlength=chunks * kinds).reshape(chunks, kinds).tolist()
        return counted

    def _pack(self, chunk: int) -> str:
        return b64encode(zlib.compress(self._rates[chunk * CHUNK : (chunk + 1) * CHUNK].tobytes())).decode()

    def _weight(self, counts: Sequence[int]) -> float:
        return sum(weight * count for weight, count in zip(self._weights, counts, strict=True))

    def _number(self, rate: float) -> int:
        if rate < 0:
            return _UNSEEN if rate == UNSEEN else _LEFT_OUT
        return bisect_left(self._edges, rate)


def _at(sums: Sequence[float], place: float) -> int:
    """The first index whose cumulative sum is above `place`. Always has a nonzero weight, in spite of rounding."""
    return bisect_right(sums, min(place, math.nextafter(sums[-1], 0.0)))
