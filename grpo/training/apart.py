"""Sampling and training at the same time, in different processes: `ranks`.

While the trainers make step n, the samplers sample the completions for step n + 1, with the policy before step n. So
every step except the first learns from completions with a lag of one update, and the loss takes this into account: see
`ApartTrainer`. Between two steps all processes hold the same policy and the same groups. Random draws depend only on
the seed and the step, so a single process that does both, one after the other, gets the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo.backend.random import derive_key
from grpo.config import Recipe
from grpo.data.source import Source, taken
from grpo.model.policy import Policy
from grpo.objective.loss import CustomLoss
from grpo.rollout import RolloutEngine, with_policy_step
from grpo.scoring.scorer import BrokenRewardError, Scorer
from grpo.training.ahead import Ahead, Sampled
from grpo.training.batches import MiniBatch
from grpo.training.clock import Clock
from grpo.training.older import lagging
from grpo.training.roles import Roles
from grpo.training.state import AHEAD, Arrays, TrainerState
from grpo.training.trainer import Trainer
from grpo.types import Group, StepMetrics, Task


@dataclass(frozen=True, slots=True)
class Handed:
    """What a process sends to all others at the end of a step.

    sampled  a sampler's share of the next step
    metrics  the first trainer's metrics of this step
    counts   the updater's counters
    failed   failures that this process has counted (`Scorer.counted`)
    busy     seconds of work
    """

    sampled: Sampled | None
    metrics: StepMetrics | None
    counts: Mapping[str, int]
    failed: Mapping[str, float]
    busy: float


class ApartTrainer(Trainer):
    """A trainer whose processes either sample or train, as their `roles` say.

    The ratios of lagging completions are relative to the policy that sampled them (`Batch.stale`), by the sampler's
    logprobs. With `loss.importance_sampling_correction` ratios are relative to the policy before the step's first
    update, and the correction multiplies each token's weight by the ratio of that policy to the sampling policy: the
    decoupled objective (arXiv 2110.00641, 2505.24298). The gap between decoding and training can only be checked at
    steps without lag, because otherwise the two logprobs come from different policies.
    """

    def __init__(
        self,
        roles: Roles,
        cfg: Recipe,
        policy: Policy,
        tasks: Source,
        engine: RolloutEngine,
        scorer: Scorer,
        custom_loss: CustomLoss | None = None,
    ) -> None:
        super().__init__(cfg, policy, tasks, engine, scorer, custom_loss, ranks=roles.everyone, learners=roles.learners)
        self.roles = roles
        self.ahead: Ahead | None = None
        self.update.check = self._check
        self._told: Mapping[str, float] = {}
        self._lags = False
        self._room = 0
        """Number of prompts that fit into the slots of each sampler, known from the first step on."""

    def step(self, n: int) -> StepMetrics:
        """Make step `n` from the groups sampled ahead for it, while the groups of the next step are sampled.

        The first step, and the first after a change of the recipe, has no such groups and samples its own first. See
        `Trainer.step`.
        """
        began = time.perf_counter()
        if not self._room:
            self._room = min(self.ranks.gather(self.engine.generator.slots // self.cfg.rollout.num_generations))
        ready = self.ahead or self._first(n)
        groups = [lagging(group, n) for group in ready.groups]
        self._lags = any(group.lag for group in groups)
        self.tasks.observe(groups)
        self._told = {**self.tasks.metrics(), **ready.told}
        tasks = taken(self.tasks, self.cfg.rollout.prompts_per_step) if n < self.cfg.optim.steps else []
        started = time.perf_counter()
        mine = self._sampled(n + 1, tasks, n - 1)
        learnt = self._learnt(n, groups, ready) if self.roles.trains else None
        counts = {name: getattr(self.update, name) for name in COUNTS}
        ended = time.perf_counter()
        own, chosen = self.scorer.counted(), learnt if self.roles.chief else None
        handed = self.ranks.gather(Handed(mine, chosen, counts, own, ended - started))
        self._elsewhere = {name: sum(one.failed[name] for one in handed) - n for name, n in own.items()}
        metrics = learnt or handed[0].metrics
        assert metrics is not None
        self._receive(n, handed[0].counts)
        ahead = self._together([one.sampled for one in handed]) if tasks else None
        self.ahead = ahead  # the last change: an earlier error leaves the waiting groups as they were
        return replace(metrics, values={**metrics.values, **self._times(handed, began, ended)})

    def _first(self, n: int) -> Ahead:
        """The groups of step `n`, sampled now, by the policy before the step."""
        tasks = taken(self.tasks, self.cfg.rollout.prompts_per_step)
        return self._together(self.ranks.gather(self._sampled(n, tasks, n - 1)))

    def _sampled(self, step: int, tasks: Sequence[Task], policy_step: int) -> Sampled | None:
        """This sampler's share of the groups for step `step`; None if it does not sample or there are no tasks."""
        self.engine.generator.drafted()  # resets the counts of evaluations
        self.scorer.begin(step)
        if self.roles.sampler is None or not tasks:
            return None
        clock, cfg = Clock(), self.cfg.rollout
        deal, key = self.roles.deal(step, len(tasks), self._room), derive_key(self.cfg.seed, "rollout", step, 0)
        with self.scorer.open(tasks) as scoring:
            groups = self.engine.rollout(tasks, cfg.num_generations, cfg.temperature, key, whole=scoring.add, deal=deal)
            clock.lap("rollout")
            try:
                scored = self.scorer.score(with_policy_step(groups, policy_step), scoring)
            except BrokenRewardError as error:
                error.step = step  # the loop is one step behind
                raise
        clock.lap("reward")
        drafted, failures = self.engine.generator.drafted(), self.scorer.failure_counts()
        return Sampled(scored, deal.taken, drafted, failures, self.scorer.metrics(), clock.laps)

    def _together(self, parts: Sequence[Sampled | None]) -> Ahead:
        """The shares of all samplers, combined."""
        return Ahead.of([part for part in parts if part is not None], self.scorer)

    def _learnt(self, n: int, groups: list[Group], ready: Ahead) -> StepMetrics:
        clock = Clock()
        clock.laps.update(ready.seconds)
        return self.learn(n, groups, groups, clock)

    def _receive(self, n: int, counts: Mapping[str, int]) -> None:
        """Bring this process to the trainers' state after step `n`."""
        if self.ranks.size == 1:
            return
        if not self.roles.trains:
            self.before.remember(self.update.optimizer)
            self.before.move()
        for arrays in self.roles.spread(self.policy.adapters.state()):
            if not self.roles.trains:
                self.policy.adapters.load_state(arrays)
        if not self.roles.trains:
            self.policy.adapters.sync_reference(self.cfg.adapter, n)
            for name, value in counts.items():
                setattr(self.update, name, value)

    def _times(self, handed: Sequence[Handed], began: float, ended: float) -> dict[str, float]:
        """How long the step took in all, how long one side waited for the other, what the exchange took, and the share
        of the step that each side worked."""
        now, busy = time.perf_counter(), [one.busy for one in handed]
        training, sampling = busy[: self.roles.trainers], busy[-self.roles.samplers :]
        wait = max(0.0, max(sampling) - max(training))
        step = now - began
        return {
            "time/wait_sampler": wait,
            "time/wait_trainer": max(0.0, max(training) - max(sampling)),
            "time/exchange": max(0.0, now - ended - wait),
            "ranks/training": sum(training) / len(training) / step,
            "ranks/sampling": sum(sampling) / len(sampling) / step,
            "step_time": step,
        }

    def batched(self, groups: list[Group], beta: float) -> list[MiniBatch]:
        """See `Trainer.batched`. With a correction, groups count as not lagging: the correction accounts for the lag,
        and ratios are relative to the policy before the step."""
        corrects = self.cfg.loss.importance_sampling_correction != "none"
        return super().batched([_not_lagging(group) for group in groups] if corrects else groups, beta)

    def told(self) -> dict[str, float]:
        """See `Trainer.told`: the metrics that the samplers sent with the step's groups."""
        return dict(self._told)

    def _check(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._lags:
            self.gap.check(step, metrics)

    def arrays(self, outlines: bool = False) -> dict[str, Arrays]:
        """See `Trainer.arrays`: includes the groups that wait for the next step."""
        return {**super().arrays(outlines), **({} if self.ahead is None else {AHEAD: self.ahead.arrays()})}

    def counts(self) -> dict[str, Any]:
        """See `Trainer.counts`: the scorer's counts come from the first sampler. All processes must call this."""
        counts = super().counts()
        gathered = self.ranks.gather(counts["scorer"] if self.keeps_records else None)
        counts["scorer"] = next(one for one in gathered if one is not None)
        return counts if self.ahead is None else {**counts, AHEAD: self.ahead.plain()}

    def load_state(self, state: TrainerState, consume: bool = False) -> None:
        """See `Trainer.load_state`."""
        super().load_state(state, consume)
        arrays = state.arrays.get(AHEAD)
        self.ahead = Ahead.loaded(arrays, state.counts[AHEAD], self.scorer) if arrays else None

    @property
    def keeps_records(self) -> bool:
        """See `Trainer.keeps_records`: true in the first sampler, because samplers score."""
        return self.roles.sampler == 0

    @property
    def whole(self) -> bool:
        """See `Trainer.whole`: false in samplers, which have no optimizer moments."""
        return self.roles.trains


COUNTS = "skipped_in_a_row", "steps_without_signal"
"""The updater's counters, by attribute name."""


def _not_lagging(group: Group) -> Group:
    return replace(group, rollouts=tuple(replace(rollout, lag=0) for rollout in group.rollouts))
