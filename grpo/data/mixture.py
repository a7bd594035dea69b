"""A `Source` of several sources: each task comes from one of them, drawn by their ratios."""

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
"""What the mixture has as much of as its sources together."""
CURRICULUM = "curriculum/"


class Mixture:
    """Draws the source of each task with the chance ratio / sum of all ratios; which task that is, the source says.

    The draws come from the seed and the number of draws before. So it does not matter how many tasks are taken at once,
    and a mixture that loads this one's state goes on as this one would. Each source keeps its own place and epoch, and
    is told of its own groups.
    """

    def __init__(self, sources: Mapping[str, Source], ratios: Mapping[str, float], seed: int) -> None:
        """`sources` by name, as their tasks say it (`Task.source`); `ratios` by the same names."""
        self.sources: Mapping[str, Source] = dict(sources)
        self._seed = seed
        self._names = list(self.sources)
        self._sums = list(accumulate(ratios[name] for name in self._names))
        self._draws = 0

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks. Raises UserError where a source that is drawn has none."""
        names = [self._draw() for _ in range(n)]
        taken = {name: iter(self._taken(name, count)) for name, count in Counter(names).items()}
        return [next(taken[name]) for name in names]

    def observe(self, groups: Sequence[Group]) -> None:
        """Tell each source of the groups of its tasks; of none, where it has none in this step."""
        for name, source in self.sources.items():
            source.observe([group for group in groups if group.task.source == name])

    def metrics(self) -> dict[str, float]:
        """What each source tells, `sources/<name>/epoch` say, `curriculum/<name>/hard` of a curriculum; and
        `dropped_prompts` of all together."""
        told = {name: source.metrics() for name, source in self.sources.items()}
        dropped = sum(metrics.get(SUMMED, 0.0) for metrics in told.values())
        return {SUMMED: dropped} | {
            _named(metric, name): value for name, metrics in told.items() for metric, value in metrics.items()
        }

    def state(self) -> dict[str, Any]:
        """How many draws there were, and the state of each source by its name."""
        return {"draws": self._draws, "sources": {name: dict(one.state()) for name, one in self.sources.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a mixture of the same sources was. A source that the state does not know begins, and so do all
        after another kind of source."""
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
        """The next tasks of a source. Raises UserError for tasks that go by another name."""
        tasks = self.sources[name].take(count)
        if odd := [task.source for task in tasks if task.source != name]:
            raise UserError(
                f"data.sources: the sampler of {name!r} gave a task of the source {odd[0]!r}. Where there are several "
                "sources, a sampler gives tasks of its own, as its stream makes them"
            )
        if len(tasks) != count:
            raise UserError(f"data.sources: the sampler of {name!r} was to give {count} tasks, and gave {len(tasks)}")
        return tasks


def _named(metric: str, source: str) -> str:
    """The name of a source's metric among those of all."""
    if metric.startswith(CURRICULUM):
        return f"{CURRICULUM}{source}/{metric.removeprefix(CURRICULUM)}"
    return f"sources/{source}/{metric}"
