"""A `Source` that draws tasks by their solve rates: few tasks that are still too hard, few that are already solved."""

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
"""Names of the metrics of the histogram of solve rates. The number is the percentage at which a bar begins."""


class Curriculum:
    """Draws tasks with replacement, each with probability proportional to the weight of its pool.

    A task's pool depends on its solve rate when it was last sampled (`data.curriculum`, `Solved`). Draws depend on the
    seed, the number of earlier draws, and the rates, so a resumed run repeats them.
    """

    def __init__(
        self,
        stream: TaskStream,
        cfg: CurriculumConfig,
        solved: Solved,
        seed: int,
        rates: RateTable | None = None,
    ) -> None:
        """`stream` has the rows. `rates` are solve rates measured earlier, float64 `[rows]`, NaN if unknown."""
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
        """The next `n` tasks. Raises UserError if every prompt is too long, or if all nonempty pools have weight 0."""
        if self._observed:  # a new step begins
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
        """Raise UserError if no task can be drawn, as `take` would."""
        if self._pools.draw(0.0) is None:
            raise self._nothing_left()

    def observe(self, groups: Sequence[Group]) -> None:
        """Move each task to the pool of its new solve rate. A task without a score stays in its pool.

        For a task that was sampled several times in the step, the rate is over all its completions.
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
        """The number of tasks in each pool, the number of tasks with a solve rate in each tenth from 0 to 1, and each
        pool's share of the step's draws."""
        drawn = self._drawn.total()
        return {
            "dropped_prompts": float(self._pools.left_out),
            **{f"curriculum/{pool}": float(size) for pool, size in self._pools.sizes().items()},
            **dict(zip(TENTHS, map(float, self._pools.histogram()), strict=True)),
            **{f"curriculum/drawn/{pool}": self._drawn[pool] / drawn for pool in POOLS if drawn},
        }

    def state(self) -> dict[str, Any]:
        """The number of draws, the solve rate of every task, and a description of the tasks and the reward."""
        return {"draws": self._draws, "of": self._of, "solve_rates": self._pools.packed()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a curriculum over the same tasks. Starts from scratch after another kind of source,
        or if rows, prompts or the reward have changed, because the rates are then not those of these tasks."""
        self._drawn, self._observed = Counter(), False  # an interrupted step is repeated
        if "solve_rates" not in state:
            return
        if others := [name for name, value in self._of.items() if state["of"].get(name) != value]:
            log.warning(
                "data.curriculum: starts from scratch, because the checkpoint's solve rates are of other %s",
                " and ".join(others),
            )
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
        pools = ", ".join(f"{size:,} {pool}" for pool, size in there.items())
        return UserError(
            f"data.curriculum: no task is left to draw: all pools with tasks ({pools}) have the weight 0. Set the "
            f"weight of one of them, such as data.curriculum.{next(iter(there))}=0.1"
        )
