"""The trainer: one step of GRPO on one screen, `Trainer.step`. The loop around it is in `grpo.runs.loop`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from grpo.backend.random import derive_key
from grpo.backend.ranks import Ranks
from grpo.config import Recipe
from grpo.data.source import Source, checked_source, taken
from grpo.generation.tally import speculation_metrics
from grpo.model.joined import Joined
from grpo.model.policy import Policy
from grpo.objective.groups import has_variance, with_advantages, with_rewards
from grpo.objective.loss import CustomLoss
from grpo.rollout import RolloutEngine, with_policy_step
from grpo.scoring.own import rewarding_steps
from grpo.scoring.scorer import Scorer
from grpo.scoring.sharing import scoring_once
from grpo.training.batches import MiniBatch, make_minibatches, useful_tokens
from grpo.training.before import Before
from grpo.training.clock import Clock
from grpo.training.gap import GapWatch
from grpo.training.gauges import Gauges, mean_kl, with_all_entropy
from grpo.training.lanes import lanes_worth
from grpo.training.metrics import step_metrics
from grpo.training.older import OlderGroups, lag_metrics
from grpo.training.packing import Packing
from grpo.training.passes import PassSettings, passes_of
from grpo.training.penalties import with_penalties
from grpo.training.schedule import learning_rate, penalty_weight
from grpo.training.state import OF_GROUPS, OLDER, Arrays, TrainerState
from grpo.training.teaching import Teacher, taught
from grpo.training.update import Updater
from grpo.types import Group, StepMetrics, Totals


class Trainer:
    """Trains a policy with GRPO: samples completions of tasks, scores them, and updates the policy.

    With several processes, `ranks`, each samples and trains on its share, and all hold the same policy.
    """

    def __init__(
        self,
        cfg: Recipe,
        policy: Policy,
        tasks: Source,
        engine: RolloutEngine,
        scorer: Scorer,
        custom_loss: CustomLoss | None = None,
        ranks: Ranks | None = None,
        teacher: Teacher | None = None,
        learners: Ranks | None = None,
    ) -> None:
        """`learners` are the processes that update the policy. Default: all `ranks`."""
        self.cfg = cfg
        self.policy = policy
        self.tasks = checked_source(tasks)
        self.engine = engine
        self.scorer = scorer
        self.ranks = ranks or Ranks()
        self.learners = learners or self.ranks
        dropout = cfg.adapter.dropout > 0
        self.passes = passes_of(PassSettings(cfg.loss, dropout, self.learners, teacher))
        self.gauges = Gauges(policy, cfg.loss, Packing.of(cfg.optim, cfg.rollout, self.learners.size), self.learners)
        self.gap = GapWatch(policy, cfg.optim.max_logp_difference, cfg.rollout.kv_bits)
        self.before = Before(policy.adapters, cfg.adapter.type == "full", policy.spread is not None)
        self.older = OlderGroups(cfg.rollout.reuse)
        self.update = Updater(
            policy,
            cfg.optim,
            cfg.loss,
            custom_loss,
            self.learners,
            dropout_seed=cfg.seed if dropout else None,
            check=self.gap.check,
            moving=self.before.move,
            teacher=teacher,
        )

    def step(self, n: int) -> StepMetrics:
        """Make step `n`, counted from 1: sample and score groups, update the policy, and return the metrics.

        Inside `wholly`, an error leaves the policy as it was before the step.
        """
        clock = Clock()
        self.engine.generator.drafted()  # resets the counts of evaluations
        self.scorer.begin(n)
        sampled, fresh = self.sample(n, clock)
        self.tasks.observe(sampled)
        return self.learn(n, sampled, fresh, clock)

    def learn(self, n: int, sampled: list[Group], fresh: list[Group], clock: Clock) -> StepMetrics:
        """The rest of step `n`: learn from the `fresh` groups. Metrics cover all `sampled` groups."""
        beta = penalty_weight(self.cfg.loss, self.cfg.optim.steps, n)
        groups, older = self.with_older(fresh, n)
        self.before.remember(self.update.optimizer)
        totals = Totals.of(groups)
        groups, penalty_metrics = self.penalised(groups, totals, beta)
        groups = with_advantages(groups, self.scorer.weights, self.cfg.advantage, self.cfg.loss.preset)
        groups = taught(groups) if self.cfg.teacher else groups
        minibatches = self.batched(groups, beta)  # fixes the token weights, before anything is split
        useful = useful_tokens(groups, minibatches, self.cfg.loss, self.policy.share_prompts)
        for enrich in self.passes:  # entropy mask, this rank's share, reference, teacher, anchor: see `PASSES`
            minibatches = enrich(self.policy, minibatches)
        kl_metrics = self.measured(fresh, n)
        rest = self.gauges.entropy_left_out(groups)
        clock.lap("logprobs")
        update = with_all_entropy(self.update(minibatches, n), rest, totals)
        self.before.move()  # even if no update was applied: the step counts
        clock.lap("update")
        self.policy.adapters.sync_reference(self.cfg.adapter, n)
        status = self.status(n, groups, beta) | penalty_metrics | kl_metrics | useful
        sources, scorer = [one.called for one in self.cfg.data.sources], self.scorer
        metrics = step_metrics(n, sampled, update, status, clock.laps, scorer.has_tools, sources, scorer.applies)
        self.older = older  # the last change: an earlier error leaves the older groups as they were
        learnt = sum(not group.replayed for group in groups)
        return replace(metrics, groups=(*groups, *sampled[learnt:]))

    def wholly(self) -> AbstractContextManager[None]:
        """A context for `step`: if it raises, the arrays are restored. `Before.wholly` describes the exceptions."""
        return self.before.wholly(self.update.optimizer)

    def sample(self, n: int, clock: Clock) -> tuple[list[Group], list[Group]]:
        """Sample and score the step's groups. Returns all groups, with those to train on first, and those to train on.

        With `rollout.dynamic_sampling` or `rollout.reuse`, groups with differing rewards come first. With
        `rollout.dynamic_sampling: k`, groups whose rewards are all equal are replaced by groups of new tasks, up to k
        times. If there are still too few, groups with equal rewards fill the step.
        """
        cfg = self.cfg
        sampled: list[Group] = []
        for attempt in range(1 + cfg.rollout.dynamic_sampling):
            varied = [group for group in sampled if self.teaches(group)]
            missing = cfg.rollout.prompts_per_step - len(varied)
            if missing == 0:
                break
            key = derive_key(cfg.seed, "rollout", n, attempt)
            tasks = taken(self.tasks, missing)
            n_each, temperature = cfg.rollout.num_generations, cfg.rollout.temperature
            deal = self.engine.deal(self.ranks, missing, n_each)  # each task has the same draws as in a single process
            with scoring_once(self.scorer, tasks, self.ranks) as scoring:  # each group is scored while others decode
                groups = self.engine.rollout(tasks, n_each, temperature, key, whole=scoring.add, deal=deal)
                clock.lap("rollout")
                self.scorer.steps_reward(chain(*self.ranks.gather(rewarding_steps(groups))))  # of all processes
                scored = scoring.scored(with_policy_step(groups, n - 1))
            sampled += with_rewards(deal.merge(scored), self.scorer.weights)
            clock.lap("reward")
        chooses = cfg.rollout.dynamic_sampling or cfg.rollout.reuse
        varied_first = sorted(sampled, key=self.teaches, reverse=True) if chooses else sampled
        return varied_first, varied_first[: cfg.rollout.prompts_per_step]

    def with_older(self, fresh: list[Group], n: int) -> tuple[list[Group], OlderGroups]:
        """The groups to train on, and the older groups to keep.

        With `rollout.reuse`, older groups replace `fresh` groups without a signal, which come last. The number of
        groups stays the same.
        """
        if not self.cfg.rollout.reuse:
            return fresh, self.older
        teaching = [group for group in fresh if self.teaches(group)]
        replayed, older = self.older.replayed(len(fresh) - len(teaching), n)
        replayed = with_rewards(replayed, self.scorer.weights) if replayed else []
        return [*fresh[: len(fresh) - len(replayed)], *replayed], older.after(n, teaching)

    def teaches(self, group: Group) -> bool:
        """Whether the rewards of a group differ: between completions, or between turns with `advantage.turns: turn`."""
        return has_variance(group, self.scorer.weights if self.cfg.advantage.turns == "turn" else None)

    def penalised(self, groups: list[Group], totals: Totals, beta: float) -> tuple[list[Group], dict[str, float]]:
        """The groups with the penalties that the recipe subtracts from rewards, and the penalties' metrics."""
        cache, longest = self.cfg.advantage.soft_overlong_cache, self.cfg.rollout.max_completion_length
        return with_penalties(groups, totals, beta, cache, longest, self.gauges)

    def batched(self, groups: list[Group], beta: float) -> list[MiniBatch]:
        """One minibatch for each update of an iteration, with a micro-batch for each rank and lane if rows allow."""
        parts = self.learners.size * lanes_worth(self.policy.model, self.cfg.loss)
        packing = Packing.of(self.cfg.optim, self.cfg.rollout, parts)
        longest, number = self.cfg.rollout.max_completion_length, self.cfg.optim.num_minibatches
        return make_minibatches(groups, self.cfg.loss, packing, longest, number, beta)

    def measured(self, groups: list[Group], n: int) -> dict[str, float]:
        """The metric `kl` at the steps chosen by `log.kl`, for a run whose loss and rewards do not compute it."""
        every = self.cfg.kl_every
        return {} if every is None or n % every else {"kl": mean_kl(self.gauges.divergences(groups), Totals.of(groups))}

    def status(self, n: int, groups: list[Group], beta: float) -> dict[str, float]:
        """The metrics that come from neither the sampled groups nor the update. `groups` are those trained on."""
        status = {
            "learning_rate": learning_rate(self.cfg.optim, n),
            **({} if (delta := self.policy.adapters.delta()) is None else {"adapter_delta": delta}),
            "peak_memory_gb": mx.get_peak_memory() / 2**30,
            "steps_without_signal": float(self.update.steps_without_signal),
            **self.told(),
        }
        status |= lag_metrics(groups) if self.cfg.rollout.reuse or self.cfg.ranks else {}
        status |= {"reuse/groups": float(sum(group.replayed for group in groups))} if self.cfg.rollout.reuse else {}
        return status | ({"beta": beta} if self.cfg.loss.beta_end is not None else {})

    def told(self) -> dict[str, float]:
        """The metrics of tasks, decoding and scoring for the step's groups."""
        return {
            **self.tasks.metrics(),
            **speculation_metrics(self.ranks.sum_counts(self.engine.generator.drafted())),
            **self.scorer.metrics(),
            **self.ranks.sum_counts(self.scorer.failure_counts()),
        }

    def state(self) -> TrainerState:
        """Everything that the steps so far have changed, for `load_state`. It holds the arrays without copying them."""
        return TrainerState(self.arrays(), self.counts())

    @property
    def divided(self) -> bool:
        """Whether other processes hold parts of what a checkpoint needs."""
        return self.ranks.shard.size > 1 or self.policy.shards.ranks.size > 1

    def arrays(self, outlines: bool = False) -> dict[str, Arrays]:
        """The current trained arrays, whole, by checkpoint file and then by path.

        If they are `divided`, all processes must call this, and read the optimizer's arrays as `Joined` says. With
        `outlines`, the optimizer's arrays have only shapes and dtypes.
        """
        optimizer: Arrays = tree_flatten(self.update.optimizer.state, destination={})
        shards = self.policy.shards
        adapters, kept = self.policy.adapters, self.cfg.adapter.moves_reference and self.cfg.needs_reference
        return {
            "adapters": adapters.whole_state(),
            **({"reference": adapters.whole_state("reference")} if kept else {}),
            "optimizer": shards.outlines(optimizer) if outlines else self._whole(optimizer),
            **({OLDER: older} if (older := self.older.arrays()) else {}),
        }

    def _whole(self, optimizer: Arrays) -> Arrays:
        shards = self.policy.shards
        return optimizer if shards.ranks.size == 1 else Joined(shards, optimizer)

    def counts(self) -> dict[str, Any]:
        """The counters of the source, the scorer and the updates, as JSON values."""
        return {
            "tasks": self.tasks.state(),
            "scorer": self.scorer.state(),
            "skipped_in_a_row": self.update.skipped_in_a_row,
            "steps_without_signal": self.update.steps_without_signal,
        }

    def load_state(self, state: TrainerState, consume: bool = False) -> None:
        """Continue from the state of a trainer with the same recipe.

        Moments may be in another form than this trainer's (`optim.moments`). `consume`: take the optimizer's arrays out
        of `state`, so that a process which keeps parts of them holds one whole array at a time.

        Raises UserError if the arrays differ otherwise in names or shapes.
        """
        saved = state.arrays.get("optimizer", {})
        optimizer = self.update.optimizer.fitted(saved)
        fitted = replace(state, arrays={**state.arrays, "optimizer": optimizer})
        fitted.check_fits(TrainerState(self.arrays(outlines=True), self.counts()))
        if consume and isinstance(saved, dict):
            saved.clear()
        adapters = self.policy.adapters
        whole = {name: arrays for name, arrays in state.arrays.items() if name not in (*OF_GROUPS, "optimizer")}
        parts = {name: adapters.shards.part(arrays) for name, arrays in whole.items()}
        parts["optimizer"] = {path: self._part(path, optimizer.pop(path)) for path in list(optimizer)}
        mx.eval(parts)
        adapters.load_state(parts["adapters"])
        if "reference" in parts:
            adapters.add("reference", parts["reference"])
        self.update.optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
        self.older = self.older.loaded(state.arrays.get(OLDER, {})) if self.older.most else self.older
        self.update.skipped_in_a_row = state.counts["skipped_in_a_row"]
        self.update.steps_without_signal = state.counts.get("steps_without_signal", 0)  # older checkpoints lack it
        self.tasks.load_state(state.counts["tasks"])
        scorer = state.counts["scorer"]
        self.scorer.load_state(scorer if self.keeps_records else {**scorer, "records": {}})

    def _part(self, path: str, whole: mx.array) -> mx.array:
        part = self.policy.shards.part_of(path, whole)
        mx.eval(part)
        return part

    @property
    def keeps_records(self) -> bool:
        """Whether this process takes over the scorer's counts: only one process does, because metrics sum them up."""
        return self.ranks.first

    @property
    def whole(self) -> bool:
        """Whether this process has everything that a checkpoint needs, or its part of a divided model's state."""
        return True
