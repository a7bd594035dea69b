"""Finds the longest completions that would fit, with everything else as in the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from grpo.config import RolloutConfig
from grpo.planning.plan import Plan, ways_out
from grpo.planning.table import table
from grpo.planning.workload import Workload
from grpo.recipes import with_settings

LONGEST = 2**20
"""The search for the longest completion ends at this many tokens."""


@dataclass(frozen=True, slots=True)
class FittingLengths:
    """The lengths of completions that fit on a machine.

    `draft` plans a workload, whether it fits or not. `positions` is the number of positions that the model was made for
    (None: unknown).
    """

    load: Workload
    draft: Callable[[Workload], Plan]
    positions: int | None

    def longest(self) -> int:
        """Tokens of the longest completion that would fit, within the model's positions; 0 if none fits.

        Found by bisection over plans, which use the footprint for lengths that were not tried out.
        """
        return longest(lambda length: self.draft(self._of(length)).fits, self._most)

    def report(self, plan: Plan) -> list[str]:
        """The plan as a table, the longest completion that would fit, and what to change for longer ones.

        The plan's own length is known to fit, even if the estimate is lower.
        """
        length = max(self.longest(), self.load.rollout.max_completion_length)
        return [*table(plan, self.load), f"longest completion that would fit: {self._words(length)}"]

    def what_fits(self) -> str:
        """A sentence to add to the error for a workload that does not fit: which shorter completions would fit."""
        length = min(self.longest(), self.load.rollout.max_completion_length - 1)
        if not length:
            return "Not even completions of one token would fit."
        return f"Completions of up to about {length:,} tokens would fit."

    @property
    def _most(self) -> int:
        """The upper end of the search in tokens: the model's positions, or `LONGEST`."""
        return LONGEST if self.positions is None else min(self.positions - self.load.longest, LONGEST)

    def _words(self, length: int) -> str:
        more = self._of(length + max(1, length // 8))
        draft = self.draft(more)
        if draft.fits or length >= self._most:
            why = "the model has no more positions" if length < LONGEST else "grpo did not search further"
            return f"{length:,} tokens; {why}"
        ways = "; ".join(way for way in ways_out(draft, more) if "max_completion_length" not in way)
        return f"about {length:,} tokens; for longer: {ways}"

    def _of(self, length: int) -> Workload:
        """The same workload with completions of another length."""
        shortest = min(self.load.rollout.min_completion_length, length - 1)
        lengths = {"max_completion_length": length, "min_completion_length": shortest}
        rollout: RolloutConfig = with_settings(self.load.rollout, lengths)
        return replace(self.load, rollout=rollout)


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest length from 1 to `most` for which `fits` is true; 0 if there is none. `fits` must be monotonic."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
