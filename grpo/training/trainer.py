"""The trainer: GRPO itself, one step on one screen."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from grpo.backend.random import derive_key
from grpo.backend.ranks import Ranks
from grpo.config import Recipe
from grpo.data.source import Source
from grpo.model.policy import Policy
from grpo.objective.groups import has_variance, with_advantages, with_rewards
from grpo.objective.loss import CustomLoss
from grpo.rollout import RolloutEngine, with_policy_step
from grpo.scoring.scorer import Scorer
from grpo.training.batches import MiniBatch, make_minibatches
from grpo.training.before import Before
from grpo.training.clock import Clock
from grpo.training.gap import GapWatch
from grpo.training.gauges import Gauges, mean_kl, with_all_entropy
from grpo.training.metrics import step_metrics
from grpo.training.packing import Packing
from grpo.training.passes import Asked, passes_of
from grpo.training.penalties import with_penalties
from grpo.training.schedule import learning_rate, penalty_weight
from grpo.training.state import Arrays, TrainerState
from grpo.training.update import Updater
from grpo.types import Group, StepMetrics, Totals


class Trainer:
    """Trains a policy on the tasks of a source, as a recipe says."""

    def __init__(
        self,
        cfg: Recipe,
        policy: Policy,
        tasks: Source,
        engine: RolloutEngine,
        scorer: Scorer,
        custom_loss: CustomLoss | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.cfg = cfg
        self.policy = policy
        self.tasks = tasks
        self.engine = engine
        self.scorer = scorer
        self.ranks = ranks or Ranks()
        drops = cfg.adapter.dropout > 0
        self.passes = passes_of(Asked(cfg.loss, drops, self.ranks))
        self.gauges = Gauges(policy, cfg.loss, Packing.of(cfg.optim, cfg.rollout), self.ranks)
        self.gap = GapWatch(policy, cfg.optim.max_logp_difference, self.ranks.first)
        seed = cfg.seed if drops else None
        self.before = Before(policy.adapters, cfg.adapter.type == "full")
        watch = (self.gap.check, self.before.move)
        self.update = Updater(policy, cfg.optim, cfg.loss, custom_loss, self.ranks, seed, *watch)

    def step(self, n: int) -> StepMetrics:
        """Sample, score, and update. `n` counts from 1."""
        clock, beta = Clock(), penalty_weight(self.cfg.loss, self.cfg.optim.steps, n)
        self.scorer.begin(n)
        sampled, groups = self.sample(n, clock)
        self.tasks.observe(sampled)
        self.before.remember(self.update.optimizer)
        totals = Totals.of(groups)
        groups, told = self.penalised(groups, totals, beta)  # where the recipe asks for it
        groups = with_advantages(groups, self.cfg.rewards, self.cfg.advantage, self.cfg.loss.preset)
        minibatches = self.batched(groups, beta)  # token weights are fixed here, before any split
        for enrich in self.passes:  # entropy mask, reference, anchor: those that the recipe asks for
            minibatches = enrich(self.policy, minibatches)
        told |= self.measured(groups, totals, n)  # if it is due
        rest = self.gauges.entropy_left_out(groups)
        clock.lap("logprobs")
        update = with_all_entropy(self.update(minibatches, n), rest, totals)
        self.before.move()  # the step counts, though no update of it was applied
        clock.lap("update")
        self.policy.adapters.sync_reference(self.cfg.adapter, n)  # if it is due
        status = self.status(n, beta) | told
        return replace(step_metrics(n, sampled, update, status, clock.laps), groups=(*groups, *sampled[len(groups) :]))

    def wholly(self) -> AbstractContextManager[None]:
        """A block around `step` that an error leaves with the arrays as they were before it: see `Before`."""
        return self.before.wholly(self.update.optimizer)

    def sample(self, n: int, clock: Clock) -> tuple[list[Group], list[Group]]:
        """All groups that were sampled and scored, and the step's worth of them to learn from, which come first.

        With `rollout.dynamic_sampling` groups without variance are replaced by fresh prompts, so many times at most;
        what is still missing then is filled up with them.
        """
        cfg = self.cfg
        sampled: list[Group] = []
        for attempt in range(1 + cfg.rollout.dynamic_sampling):
            varied = [group for group in sampled if has_variance(group)]
            missing = cfg.rollout.prompts_per_step - len(varied)
            if missing == 0:
                break
            key = derive_key(cfg.seed, "rollout", n, attempt, *self.ranks.own)
            tasks = self.tasks.take(missing)
            mine, n_each, temperature = self.ranks.share(tasks), cfg.rollout.num_generations, cfg.rollout.temperature
            with self.scorer.open(mine) as scoring:  # each group is scored while others decode
                groups = self.engine.rollout(mine, n_each, temperature, key, whole=scoring.add)
                clock.lap("rollout")
                scored = self.scorer.score(with_policy_step(groups, n - 1), scoring)
            sampled += with_rewards(self.ranks.merge(scored), cfg.rewards)
            clock.lap("reward")
        varied_first = sorted(sampled, key=has_variance, reverse=True) if cfg.rollout.dynamic_sampling else sampled
        return varied_first, varied_first[: cfg.rollout.prompts_per_step]

    def penalised(self, groups: list[Group], totals: Totals, beta: float) -> tuple[list[Group], dict[str, float]]:
        """The groups with what is taken off their rewards, and its metrics."""
        cache, longest = self.cfg.advantage.soft_overlong_cache, self.cfg.rollout.max_completion_length
        return with_penalties(groups, totals, beta, cache, longest, self.gauges)

    def batched(self, groups: list[Group], beta: float) -> list[MiniBatch]:
        """A minibatch for each update of a pass, of a micro-batch for each process at least."""
        packing = Packing.of(self.cfg.optim, self.cfg.rollout, self.ranks.size)
        longest, number = self.cfg.rollout.max_completion_length, self.cfg.optim.num_minibatches
        return make_minibatches(groups, self.cfg.loss, packing, longest, number, beta)

    def measured(self, groups: list[Group], totals: Totals, n: int) -> dict[str, float]:
        """`kl` at the steps at which `log.kl` asks for it, in a run that has no penalty to tell it."""
        every = self.cfg.kl_every
        return {} if every is None or n % every else {"kl": mean_kl(self.gauges.divergences(groups), totals)}

    def status(self, n: int, beta: float) -> dict[str, float]:
        """What the trainer itself has to tell about a step."""
        status = {
            "learning_rate": learning_rate(self.cfg.optim, n),
            **({} if (delta := self.policy.adapters.delta()) is None else {"adapter_delta": delta}),
            "peak_memory_gb": mx.get_peak_memory() / 2**30,
            **self.tasks.metrics(),
            "steps_without_signal": float(self.update.steps_without_signal),
            **self.scorer.metrics(),
            **self.ranks.sum_counts(
                {f"rewards/{name}/failures": count for name, count in self.scorer.failures.items()}
            ),
        }
        return status | ({"beta": beta} if self.cfg.loss.beta_end is not None else {})

    def state(self) -> TrainerState:
        """What the steps so far have changed: what `load_state` takes. Whoever keeps it keeps its arrays in memory."""
        return TrainerState(self.arrays(), self.counts())

    def arrays(self) -> dict[str, Arrays]:
        """The arrays that the steps so far have changed, as they are now: by file, then by path or name."""
        adapters, kept = self.policy.adapters, self.cfg.adapter.moves_reference and self.cfg.needs_reference
        return {
            "adapters": adapters.state(),
            **({"reference": adapters.state("reference")} if kept else {}),
            "optimizer": tree_flatten(self.update.optimizer.state, destination={}),
        }

    def counts(self) -> dict[str, Any]:
        """What the rooms have counted so far, as JSON holds it."""
        return {
            "tasks": self.tasks.state(),
            "scorer": self.scorer.state(),
            "skipped_in_a_row": self.update.skipped_in_a_row,
            "steps_without_signal": self.update.steps_without_signal,
        }

    def load_state(self, state: TrainerState) -> None:
        """Go on where a trainer with this recipe was. Raises UserError for the state of another model or adapter."""
        state.check_fits(self.state())
        self.policy.adapters.load_state(state.arrays["adapters"])
        if "reference" in state.arrays:
            self.policy.adapters.add("reference", state.arrays["reference"])
        self.update.optimizer.state = tree_unflatten(dict(state.arrays["optimizer"]))
        self.update.skipped_in_a_row = state.counts["skipped_in_a_row"]
        self.update.steps_without_signal = state.counts.get("steps_without_signal", 0)  # not in older checkpoints
        self.tasks.load_state(state.counts["tasks"])
        scored = state.counts["scorer"]  # the first process's: counted by each of several, they would be summed up
        self.scorer.load_state(scored if self.ranks.first else {**scored, "records": {}})
