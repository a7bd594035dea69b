"""A `Source` that mixes several sources: the source of each task is drawn by the ratios."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from grpo.backend.random import derive_seed
from grpo.data.source import Source
from grpo.errors import UserError
from grpo.types import Group, Task

SUMMED = "dropped_prompts"
"""The metric that is summed over the sources."""
CURRICULUM = "curriculum/"


class Mixture:
    """Draws the source of each task with probability ratio / (sum of all ratios). The source then chooses the task.

    Draws depend only on the seed and the number of earlier draws. So the number of tasks per call does not matter, and
    a mixture that loads this one's state continues in the same way. Each source has its own position and epoch, and
    observes only its own groups.
    """

    def __init__(self, sources: Mapping[str, Source], ratios: Mapping[str, float], seed: int) -> None:
        """`sources` by name, the same as in their tasks (`Task.source`); `ratios` by the same names."""
        self.sources: Mapping[str, Source] = dict(sources)
        self._seed = seed
        self._names = list(self.sources)
        self._sums = list(accumulate(ratios[name] for name in self._names))
        self._draws = 0

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks. Raises UserError if a drawn source has no task."""
        names = [self._draw() for _ in range(n)]
        taken = {name: iter(self._taken(name, count)) for name, count in Counter(names).items()}
        return [next(taken[name]) for name in names]

    def observe(self, groups: Sequence[Group]) -> None:
        """Pass the groups of its tasks to each source; an empty list if there are none in this step."""
        for name, source in self.sources.items():
            source.observe([group for group in groups if group.task.source == name])

    def metrics(self) -> dict[str, float]:
        """Each source's metrics, such as `sources/<name>/epoch`, or `curriculum/<name>/hard` for a curriculum; and
        `dropped_prompts` summed over the sources."""
        by_source = {name: source.metrics() for name, source in self.sources.items()}
        dropped = sum(metrics.get(SUMMED, 0.0) for metrics in by_source.values())
        return {SUMMED: dropped} | {
            _named(metric, name): value for name, metrics in by_source.items() for metric, value in metrics.items()
        }

    def state(self) -> dict[str, Any]:
        """The number of draws, and the state of each source by its name."""
        return {"draws": self._draws, "sources": {name: dict(source.state()) for name, source in self.sources.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a mixture of the same sources. Sources that are missing from the state start at the
        beginning, and so do all of them after another kind of source."""
        known: Mapping[str, Any] = state.get("sources", {})
        self._draws = state["draws"] if known else 0
        for name, source in self.sources.items():
            if name in known:
                source.load_state(known[name])

    def _draw(self) -> str:
        """The name of the source that the next task comes from."""
        at = random.Random(derive_seed(self._seed, "mixture", self._draws)).random()
        self._draws += 1
        return self._names[min(bisect_right(self._sums, at * self._sums[-1]), len(self._names) - 1)]

    def _taken(self, name: str, count: int) -> list[Task]:
        """The next tasks of a source. Raises UserError for tasks with another source's name."""
        tasks = self.sources[name].take(count)
        if odd := [task.source for task in tasks if task.source != name]:
            raise UserError(
                f"data.sources: the sampler of {name!r} gave a task of the source {odd[0]!r}. With several sources, a "
                "sampler must give tasks of its own stream"
            )
        if len(tasks) != count:
            raise UserError(f"data.sources: the sampler of {name!r} must give {count} tasks, but gave {len(tasks)}")
        return tasks


def _named(metric: str, source: str) -> str:
    """The name of a source's metric in the mixture's metrics."""
    if metric.startswith(CURRICULUM):
        return f"{CURRICULUM}{source}/{metric.removeprefix(CURRICULUM)}"
    return f"sources/{source}/{metric}"
