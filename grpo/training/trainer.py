"""The trainer: GRPO itself, one step on one screen, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo.backend.device import on_gpu
from grpo.backend.random import derive_key
from grpo.config import Recipe
from grpo.data.stream import TaskStream
from grpo.model.policy import Policy
from grpo.objective.groups import with_advantages
from grpo.rollout import RolloutEngine
from grpo.scoring.scorer import Scorer
from grpo.training.batches import make_batches, with_reference
from grpo.training.checkpoint import save_checkpoint
from grpo.training.evaluate import Evaluator
from grpo.training.metrics import step_metrics
from grpo.training.signals import StopRequest
from grpo.training.update import Updater
from grpo.types import EvalMetrics, StepMetrics

Log = Callable[[StepMetrics | EvalMetrics], None]

GPU_PADDING = 64
"""Batches are padded to multiples of this on a GPU, where the update is compiled once for each shape."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: its last step, the checkpoint there, and the evaluations before and after (if any)."""

    step: int
    checkpoint: Path
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
    ) -> None:
        self.cfg = cfg
        self.policy = policy
        self.tasks = tasks
        self.engine = engine
        self.scorer = scorer
        self.evaluate = evaluate
        self.update = Updater(policy, cfg)
        self.pad_to = GPU_PADDING if on_gpu() else 1

    def step(self, n: int) -> StepMetrics:
        """Sample, score, and update once. `n` counts from 1."""
        cfg, clock = self.cfg, _Clock()
        tasks = self.tasks.take(cfg.rollout.prompts_per_step)
        key = derive_key(cfg.seed, "rollout", n)
        groups = self.engine.rollout(tasks, cfg.rollout.num_generations, cfg.rollout.temperature, key)
        clock.lap("rollout")
        groups = self.scorer.score(groups)
        clock.lap("reward")
        groups = with_advantages(groups, cfg.rewards, cfg.advantage)
        batches = make_batches(groups, cfg, self.pad_to)  # token weights are fixed here, before any split
        batches = with_reference(batches, self.policy, cfg.loss.beta)  # nothing to do when beta == 0
        clock.lap("logprobs")
        update = self.update(batches, n)
        clock.lap("update")
        return step_metrics(n, groups, update, clock.laps)

    def run(self, folder: Path, log: Log, stop: StopRequest) -> Outcome:
        """All steps, with evaluations and checkpoints between them, until the last or until asked to stop."""
        before = after = self._evaluated(0, log)
        cfg, n = self.cfg, 0
        while n < cfg.optim.steps and not stop.requested:
            n += 1
            log(self.step(n))
            last = n == cfg.optim.steps or stop.requested
            if last or n % cfg.checkpoint.every == 0:
                save_checkpoint(folder / "checkpoints", n, self.policy.adapters, cfg.checkpoint.keep)
            if not stop.requested and (last or (cfg.eval and n % cfg.eval.every == 0)):
                after = self._evaluated(n, log)
        if n == 0:  # stopped before the first step: what there is to keep is the adapter as it began
            save_checkpoint(folder / "checkpoints", n, self.policy.adapters, cfg.checkpoint.keep)
        return Outcome(n, folder / "checkpoints" / f"step-{n:06d}", stop.signal, before, after)

    def _evaluated(self, n: int, log: Log) -> EvalMetrics | None:
        if self.evaluate is None:
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
        self.laps[name] = now - self._last
        self._last = now
