"""Counts what speculation does, for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(slots=True)
class DraftTally:
    """Sums over the steps so far, which can be summed over processes. A turn is one step of one row."""

    turns: float = 0.0
    fed: float = 0.0
    wide_turns: float = 0.0
    wide_tokens: float = 0.0
    untimed: float = 0.0
    """Wide turns for which the time of plain decoding is not known."""
    seconds: float = 0.0
    plain_seconds: float = 0.0
    """Estimated time of plain decoding for the same tokens."""

    def add(self, width: int, rows: int, taken: int, seconds: float, plain: float | None = None) -> None:
        """Add a step. `plain` is the time of a plain step, if it is known."""
        if not rows:
            return
        self.turns += rows
        self.fed += rows * width
        if width > 1:
            self.wide_turns += rows
            self.wide_tokens += taken
            self.untimed += rows * (plain is None)
        self.seconds += seconds
        self.plain_seconds += seconds if plain is None else plain * taken / rows

    def counts(self) -> dict[str, float]:
        """The sums by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def clear(self) -> None:
        """Set all sums to zero."""
        for field in fields(self):
            setattr(self, field.name, 0.0)


def speculation_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """A training step's metrics, from the sums of all processes. Empty if no row was decoded."""
    sums = DraftTally(**counts)
    if not sums.turns:
        return {}
    beyond = (sums.wide_tokens - sums.wide_turns) / sums.wide_turns if sums.wide_turns else 0.0
    metrics = {"speculation/accepted": beyond, "speculation/width": sums.fed / sums.turns}
    if sums.seconds and not sums.untimed:
        metrics["speculation/gain"] = sums.plain_seconds / sums.seconds
    return metrics
