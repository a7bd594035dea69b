"""A `Source` that draws tasks by how often they were solved: few that are too hard now, few that teach nothing more."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.backend.random import derive_seed
from grpo.config import CurriculumConfig
from grpo.data.fingerprint import fingerprint
from grpo.data.pools import BINS, LEFT_OUT, POOLS, Pools
from grpo.data.rates import RateTable
from grpo.data.solved import Solved
from grpo.data.stream import TaskStream
from grpo.errors import UserError
from grpo.types import Group, Rollout, Task

log = logging.getLogger(__name__)

TENTHS = tuple(f"curriculum/solve_rate/{100 * place // BINS:02}" for place in range(BINS))
"""The metrics of the histogram of solve rates, by the per cent that each bar begins at."""


class Curriculum:
    """Draws each task with a chance that is its pool's weight over the weights of all tasks, with replacement.

    A task's pool goes by its solve rate when it was last sampled (`data.curriculum`, `Solved`). The draws come from the
    seed and the number of draws before: with the same rates, as after a resume, they are the same.
    """

    def __init__(
        self,
        stream: TaskStream,
        cfg: CurriculumConfig,
        solved: Solved,
        seed: int,
        rates: RateTable | None = None,
    ) -> None:
        """`stream` has the rows. `rates` are solve rates that are known from before, float64 `[rows]`, NaN where none
        is."""
        self._stream, self._cfg, self._solved, self._seed = stream, cfg, solved, seed
        self._pools = Pools(len(stream), cfg)
        self._draws = 0
        self._drawn: Counter[str] = Counter()
        self._observed = False
        if rates is not None:
            self._pools.begin(rates)
        self._of = {
            "rows": fingerprint(stream.rows),
            "prompts": stream.settings,
            "reward": list(solved.graders),
            "best": solved.best,
        }

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks. Raises UserError where every prompt is too long, or all pools that are left weigh 0."""
        if self._observed:  # the draws of a new step
            self._drawn, self._observed = Counter(), False
        tasks: list[Task] = []
        while len(tasks) < n:
            index = self._draw()
            task = self._stream.kept(index)
            if task is None:
                self._pools.put(index, LEFT_OUT)
                continue
            self._drawn[self._pools.pool(index)] += 1
            tasks.append(task)
        return tasks

    def check(self) -> None:
        """Raise UserError where no task could be drawn now, as `take` would."""
        if self._pools.draw(0.0) is None:
            raise self._nothing_left()

    def observe(self, groups: Sequence[Group]) -> None:
        """Put each task in the pool of its solve rate now. A task without a score stays where it is.

        A task that was sampled several times in the step has the rate of all its completions.
        """
        sampled: dict[int, list[Rollout]] = {}
        for group in groups:
            if group.task.source == self._stream.source:
                sampled.setdefault(group.task.index, []).extend(group.rollouts)
        for index, rollouts in sampled.items():
            if (rate := self._solved.rate(rollouts)) is not None:
                self._pools.put(index, rate)
        self._observed = True

    def metrics(self) -> dict[str, float]:
        """How many tasks are in each pool now, how many have a solve rate in each tenth from 0 to 1, and which share
        of the step's draws came from each pool."""
        drawn = self._drawn.total()
        return {
            "dropped_prompts": float(self._pools.left_out),
            **{f"curriculum/{pool}": float(size) for pool, size in self._pools.sizes().items()},
            **dict(zip(TENTHS, map(float, self._pools.histogram()), strict=True)),
            **{f"curriculum/drawn/{pool}": self._drawn[pool] / drawn for pool in POOLS if drawn},
        }

    def state(self) -> dict[str, Any]:
        """How many draws there were, the solve rate of every task, and what the rates are of."""
        return {"draws": self._draws, "of": self._of, "solve_rates": self._pools.packed()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a curriculum over the same tasks was. After another kind of source, and where rows, prompts or
        the reward are others, it goes on as a curriculum that begins: those rates are not of its tasks."""
        self._drawn, self._observed = Counter(), False  # a step that was broken off is made anew
        if "solve_rates" not in state:
            return
        if others := [name for name, value in self._of.items() if state["of"].get(name) != value]:
            log.warning("data.curriculum: its solve rates are of other %s, so it begins anew", " and ".join(others))
            return
        self._draws = state["draws"]
        self._pools.load(state["solve_rates"])

    def _draw(self) -> int:
        at = random.Random(derive_seed(self._seed, "curriculum", self._draws)).random()
        self._draws += 1
        index = self._pools.draw(at)
        if index is None:
            raise self._nothing_left()
        return index

    def _nothing_left(self) -> UserError:
        there = {pool: size for pool, size in self._pools.sizes().items() if size}
        if not there:
            return self._stream.nothing_fits()
        said = ", ".join(f"{size:,} {pool}" for pool, size in there.items())
        return UserError(
            f"data.curriculum: no task is left to draw: all pools that have tasks ({said}) have the weight 0. Give one "
            f"of them a weight, such as data.curriculum.{next(iter(there))}=0.1"
        )
