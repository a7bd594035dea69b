"""Turns tasks into groups of trajectories: an environment plays each task, and one generator decodes for all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx

from grpo.backend.ranks import Ranks
from grpo.backend.tickets import Deal
from grpo.config import RolloutConfig
from grpo.environments.driver import Driver
from grpo.environments.environment import Environment, checked
from grpo.environments.mistakes import check_awaitable, check_trajectories, mistake_of
from grpo.environments.sampler import Sampler
from grpo.environments.scheduler import Job
from grpo.environments.single import SingleTurn
from grpo.errors import RunError
from grpo.generation.generator import Generator, seed_of
from grpo.generation.progress import TokenProgress
from grpo.generation.rows import Row
from grpo.generation.sampling import Sampling
from grpo.types import Group, Rollout, Task

Whole = Callable[[int, Group], object]
"""Callback `(place, group)` for a finished group; `place` is the task's index among the tasks of this process."""


class RolloutEngine:
    """Samples the policy: with logprobs for training, without for evaluation."""

    def __init__(self, generator: Generator, sampling: Sampling, environment: Environment | None = None) -> None:
        """`environment` turns tasks into trajectories; by default, completions are single turns.

        Raises UserError for an object that is not an environment.
        """
        self.generator = generator
        self.sampling = sampling
        self.environment = SingleTurn() if environment is None else checked(environment)

    def rollout(
        self,
        tasks: Sequence[Task],
        n: int,
        temperature: float,
        draws: mx.array | Sequence[int],
        logprobs: bool = True,
        phase: str = "rollout",
        whole: Whole | None = None,
        deal: Deal | None = None,
    ) -> list[Group]:
        """`n` trajectories of each task at `temperature` (0: greedy), as groups without scores.

        `draws` is a key for all tasks, or a seed per task; with seeds, the draws of a task do not depend on the other
        tasks. With several processes, this process samples the tasks that it takes from the `deal`, which then has
        their numbers; the draws of a task are the same in every process. Greedy completions ignore filters and
        penalties. `phase` is the name in progress reports. `whole` is called with each group while other groups decode,
        in the order in which groups end. If an environment adds to prompts, a group's task has the common beginning of
        its rows' prompts (`Sampler.begin_after`).
        """
        deal = deal or Deal(range(len(tasks)))
        if not deal.goes_on:  # a process whose share is empty
            return []
        generator, sampling = self.generator, at_temperature(self.sampling, temperature)
        driver = Driver(generator.open(), generator.tokenizer, sampling, logprobs)
        told, seeds = TokenProgress(generator.progress, phase), _seeds(draws, len(tasks))
        rows: list[list[Row]] = []
        plays: list[Job[Group]] = []

        def has_room() -> bool:
            unbegun = sum(not own and not play.end.is_open for own, play in zip(rows, plays, strict=True))
            return len(plays) < len(deal.begin) or driver.engine.load + unbegun * n < generator.slots

        def begin(wait: bool) -> bool:
            before = len(plays)
            while deal.goes_on and has_room() and (number := deal.take(wait)) is not None:
                sampler, wait = Sampler(driver, tasks[number], n, *seeds[number], place=len(plays)), False
                rows.append(sampler.rows)
                plays.append(driver.jobs.start(self._play(tasks[number], sampler, len(plays), whole)))
            return len(plays) > before

        with driver:
            driver.run(lambda: told.now_and_then(rows), begin)
            groups = [self._result(play, tasks[number]) for number, play in zip(deal.taken, plays, strict=True)]
        told.tell(rows)
        return groups

    def deal(self, ranks: Ranks, tasks: int, n: int) -> Deal:
        """The distribution of `tasks` tasks with `n` trajectories each over processes. All of `ranks` must call it."""
        return Deal.of(ranks, tasks, self.generator.slots // n)

    async def _play(self, task: Task, sampler: Sampler, place: int, whole: Whole | None) -> Group:
        """Play one task, and pass its group to `whole`."""
        with self._named(task):
            playing = self.environment.rollout(task, sampler)
            check_awaitable(playing)
            trajectories = check_trajectories(await playing, sampler.n)
        group = Group(sampler.task, tuple(map(Rollout, trajectories)))
        if whole is not None:
            whole(place, group)
        return group

    def _result(self, play: Job[Group], task: Task) -> Group:
        with self._named(task):
            return play.result()

    @contextmanager
    def _named(self, task: Task) -> Iterator[None]:
        """A block whose exceptions name the environment and the row; a mistake in the environment's code becomes a
        RunError."""
        name, row = type(self.environment).__name__, f"row {task.index} of {task.source}"
        try:
            yield
        except Exception as error:
            if mistake := mistake_of(error):
                raise RunError(f"environment {name}, {row}: {mistake}") from error
            error.add_note(f"in the environment {name}, on {row}")
            raise


def _seeds(draws: mx.array | Sequence[int], tasks: int) -> list[tuple[int, tuple[int, ...]]]:
    """The seed and position of each task's draws: one seed with the task's number, or a seed per task."""
    if isinstance(draws, mx.array):
        seed = seed_of(draws)
        return [(seed, (number,)) for number in range(tasks)]
    return [(seed, ()) for seed in draws]


def with_policy_step(groups: Sequence[Group], step: int) -> list[Group]:
    """The same groups with `policy_step` set to `step`, the number of training steps before they were sampled."""
    return [replace(group, rollouts=tuple(_at(rollout, step) for rollout in group.rollouts)) for group in groups]


def _at(rollout: Rollout, step: int) -> Rollout:
    return replace(rollout, trajectory=replace(rollout.trajectory, policy_step=step))


def at_temperature(sampling: Sampling, temperature: float) -> Sampling:
    """The same sampling at another temperature. Greedy sampling (0) has no filters and no penalty."""
    if temperature == 0:
        sampling = replace(sampling, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    return replace(sampling, temperature=temperature)


def sampling_of(cfg: RolloutConfig) -> Sampling:
    """The sampling settings of a recipe."""
    return Sampling(
        temperature=cfg.temperature,
        max_tokens=cfg.max_completion_length,
        min_tokens=cfg.min_completion_length,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        stop=cfg.stop,
        stop_ids=cfg.stop_token_ids,
        max_repeats=cfg.max_repeats,
    )
