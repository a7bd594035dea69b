"""Compares ways to distribute prompts over processes if conversations differ in length: tickets and fixed shares.

    mlx.launch -n 2 --env MKL_NUM_THREADS=1 -- python scripts/benchmarks/uneven.py [--shape qwen3-1m] [--turns 11] …

Both ways take turns in the same processes, with the same prompts and draws. The prompt determines the number of turns
of its conversations: most prompts have few turns, some have up to `--most`. Prints the ratio ticket / share of each
pair's seconds (below 1, tickets are faster), its median and 90 % interval, and how unevenly the processes sampled. With
`--even`, all conversations have the same number of turns, which shows the cost of tickets.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from statistics import median
from typing import Any
from unittest.mock import patch

from turns import interval

from grpo.backend.device import setup
from grpo.backend.random import derive_seed
from grpo.backend.ranks import Ranks
from grpo.backend.tickets import Deal
from grpo.benchmark.models import vocabulary_of
from grpo.benchmark.setting import Setting
from grpo.benchmark.train import step_trainer
from grpo.environments.sampler import Sampler
from grpo.generation.rows import Row
from grpo.types import Task, Trajectory

TOLD = tuple(range(5, 13))


class Conversations:
    """An environment in which every row of a prompt has the same number of turns, from 1 to `most`, mostly few."""

    def __init__(self, most: int, even: bool) -> None:
        self.most, self.even, self.step = most, even, 0

    def turns(self, task: Task) -> int:
        if self.even:
            return max(1, self.most // 4)
        uniform = random.Random(derive_seed(self.step, "turns", task.index)).random()
        return max(1, round(self.most ** (uniform**2)))

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        rows, turns = sampler.begin(task.prompt_ids, sampler.n, keep=True), self.turns(task)
        return await sampler.gather(*(self._played(row, sampler, turns) for row in rows))

    async def _played(self, row: Row, sampler: Sampler, turns: int) -> Trajectory:
        answer = await sampler.ended(row)
        for _ in range(turns - 1):
            if row.room < len(TOLD) + 1 or answer.finish_reason == "length":
                break
            answer = await sampler.extend(row, TOLD)
        sampler.release(row)
        return answer


@contextmanager
def by_share() -> Iterator[None]:
    """A block in which each process gets a fixed share of the tasks."""
    with patch.object(Deal, "of", lambda ranks, total, room: Deal(ranks.share(range(total)), ranks)):  # noqa: ARG005
        yield


def timed(trainer: Any, ranks: Ranks, step: int) -> tuple[float, float]:
    """Seconds of a step, and of this process's rollout in it."""
    ranks.wait()
    start = time.perf_counter()
    values = trainer.step(step).values
    return time.perf_counter() - start, values["time/rollout"]


def by_way(ranks: Ranks, rollouts: Sequence[tuple[float, float]]) -> list[list[list[float]]]:
    """The seconds of all processes' rollouts, by way and process."""
    everyone = ranks.gather(list(zip(*rollouts, strict=True)))
    return [[theirs[way] for theirs in everyone] for way in (0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"prompts": 16, "completions": 4, "prompt-length": 64, "completion-length": 640}
    for name, default in {**defaults, "slots": 8, "turns": 11, "most": 24, "mean": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", default="qwen3-1m")
    parser.add_argument("--even", action="store_true")
    args = vars(parser.parse_args())
    setup()
    ranks = Ranks.launched()
    setting = Setting(
        **{one.name: args[one.name] for one in fields(Setting) if one.name in args and one.name != "slots"}
    )
    trainer = step_trainer(setting, ranks)
    engine, talks = trainer.engine, Conversations(args["most"], args["even"])
    engine.environment, engine.generator.slots = talks, args["slots"]
    engine.generator.neighbours = ranks.neighbours
    engine.generator.stop_ids = frozenset(range(0, vocabulary_of(trainer.policy.model), args["mean"]))
    found: list[tuple[float, float]] = []
    rollouts: list[tuple[float, float]] = []
    for turn in range(args["turns"] + 1):
        talks.step, seconds = turn, {}
        for way in ("share", "ticket") if turn % 2 == 0 else ("ticket", "share"):
            if way == "share":
                with by_share():
                    seconds[way] = timed(trainer, ranks, turn + 1)
            else:
                seconds[way] = timed(trainer, ranks, turn + 1)
        if ranks.first:
            print({way: [round(one, 2) for one in times] for way, times in seconds.items()}, flush=True)
        if turn:  # the first turn builds kernels
            found.append((seconds["share"][0], seconds["ticket"][0]))
            rollouts.append((seconds["share"][1], seconds["ticket"][1]))
    waits = [
        [max(one) * len(one) / sum(one) for one in zip(*theirs, strict=True)] for theirs in by_way(ranks, rollouts)
    ]
    if ranks.first:
        ratios = [ticket / share for share, ticket in found]
        kind = "even" if args["even"] else "uneven"
        print(f"{setting}, {ranks.size} processes, {args['slots']} slots each, {kind} turns")
        low, high = interval(ratios)
        print(f"ticket / share: {median(ratios):.3f} ({low:.3f} to {high:.3f}) of {len(ratios)} pairs of steps")
        for way, name in enumerate(("share", "ticket")):
            seconds = median(pair[way] for pair in found)
            print(f"{name}: {seconds:.2f} s a step; the longest rollout takes {median(waits[way]):.2f} × the mean")
    ranks.finish()


if __name__ == "__main__":
    main()
