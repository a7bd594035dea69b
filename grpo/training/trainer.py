"""The trainer: GRPO itself, one step on one screen, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo.backend.random import derive_key
from grpo.backend.ranks import Ranks
from grpo.config import Recipe
from grpo.data.stream import TaskStream
from grpo.model.policy import Policy
from grpo.objective.groups import has_variance, with_advantages, with_rewards
from grpo.objective.loss import CustomLoss
from grpo.rollout import RolloutEngine
from grpo.scoring.scorer import Scorer
from grpo.training.batches import make_minibatches, mean_entropy, with_old_logprobs, with_reference, with_top_entropy
from grpo.training.checkpoint import checkpoint_path, save_checkpoint
from grpo.training.evaluate import Evaluator
from grpo.training.folder import CHECKPOINTS, NOT_FINITE
from grpo.training.metrics import step_metrics
from grpo.training.penalties import penalty_metrics, with_penalties
from grpo.training.schedule import learning_rate, penalty_weight
from grpo.training.signals import StopRequest
from grpo.training.update import Updater
from grpo.types import EvalMetrics, Group, StepMetrics

Log = Callable[[StepMetrics | EvalMetrics], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: its last step, the checkpoint there (none before the first), and the evaluations, if any."""

    step: int
    checkpoint: Path | None
    stopped_by: int | None
    before: EvalMetrics | None
    after: EvalMetrics | None


class Trainer:
    """Trains a policy on a stream of tasks, as a recipe says."""

    def __init__(
        self,
        cfg: Recipe,
        policy: Policy,
        tasks: TaskStream,
        engine: RolloutEngine,
        scorer: Scorer,
        evaluate: Evaluator | None = None,
        custom_loss: CustomLoss | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.cfg = cfg
        self.policy = policy
        self.tasks = tasks
        self.engine = engine
        self.scorer = scorer
        self.evaluate = evaluate
        self.ranks = ranks or Ranks()
        self.update = Updater(policy, cfg, custom_loss, self.ranks)

    def step(self, n: int) -> StepMetrics:
        """Sample, score, and update. `n` counts from 1."""
        cfg, policy, clock = self.cfg, self.policy, _Clock()
        beta = penalty_weight(cfg, n)
        sampled, groups = self.sample(n, clock)
        groups = with_penalties(groups, policy, cfg, beta)  # as they are unless the recipe asks for some
        groups = with_advantages(groups, cfg)
        minibatches = make_minibatches(groups, cfg, self.ranks.size)  # token weights are fixed here, before any split
        minibatches = with_top_entropy(minibatches, policy, cfg)
        minibatches = [self.ranks.share(batches) for batches in minibatches]
        minibatches = [with_reference(batches, policy, beta, cfg) for batches in minibatches]  # not for beta 0
        minibatches = with_old_logprobs(minibatches, policy, cfg)  # nothing to do for a single one
        clock.lap("logprobs")
        update = self.update(minibatches, n)
        clock.lap("update")
        policy.adapters.sync_reference(cfg.adapter, n)  # if it is due
        status = self.status(n, beta) | penalty_metrics(groups, cfg)
        if "entropy" not in update.metrics:  # nothing was trained on; entropy is told all the same
            status["entropy"] = mean_entropy(groups, policy, cfg)
        return step_metrics(n, sampled, update, status, clock.laps)

    def sample(self, n: int, clock: _Clock) -> tuple[list[Group], list[Group]]:
        """All groups that were sampled and scored, and the step's worth of them to learn from.

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
            groups = self.engine.rollout(mine, n_each, temperature, key) if mine else []
            clock.lap("rollout")
            scored = self.ranks.merge(self.scorer.score(groups) if groups else [])
            sampled += with_rewards(scored, cfg.rewards)
            clock.lap("reward")
        varied_first = sorted(sampled, key=has_variance, reverse=True) if cfg.rollout.dynamic_sampling else sampled
        return sampled, varied_first[: cfg.rollout.prompts_per_step]

    def status(self, n: int, beta: float) -> dict[str, float]:
        """What the trainer itself has to tell about a step."""
        status = {
            "learning_rate": learning_rate(self.cfg.optim, n),
            **({} if (delta := self.policy.adapters.delta()) is None else {"adapter_delta": delta}),
            "dropped_prompts": float(self.tasks.dropped),
            **self.ranks.sum_counts(
                {f"rewards/{name}/failures": count for name, count in self.scorer.failures.items()}
            ),
        }
        return status | ({"beta": beta} if self.cfg.loss.beta_end is not None else {})

    def run(self, folder: Path, log: Log, stop: StopRequest) -> Outcome:
        """All steps, with evaluations and checkpoints between them, until the last or until asked to stop.

        However it ends, an error included, there is a checkpoint of the last step that was finished (if one was).
        """
        cfg, n, saved = self.cfg, 0, -1
        self.update.inspect = folder / NOT_FINITE
        before = after = self._evaluated(0, log)
        try:
            while n < cfg.optim.steps and not self.ranks.any(stop.requested):
                log(self.step(n + 1))
                n += 1
                if n % cfg.checkpoint.every == 0:
                    saved = self._save(folder, n)
                if not self.ranks.any(stop.requested) and (
                    n == cfg.optim.steps or (cfg.eval and n % cfg.eval.every == 0)
                ):
                    after = self._evaluated(n, log)
        except Exception:
            if 0 < n != saved:
                self._save(folder, n)
            raise
        if 0 < n != saved:
            self._save(folder, n)
        return Outcome(n, checkpoint_path(folder / CHECKPOINTS, n) if n else None, stop.signal, before, after)

    def _save(self, folder: Path, n: int) -> int:
        if self.ranks.first:
            save_checkpoint(folder / CHECKPOINTS, n, self.policy.adapters, self.cfg.checkpoint.keep)
        return n

    def _evaluated(self, n: int, log: Log) -> EvalMetrics | None:
        if self.evaluate is None or not self.ranks.first:
            return None
        metrics = self.evaluate(n)
        log(metrics)
        return metrics


class _Clock:
    """Seconds spent between laps, by name."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
