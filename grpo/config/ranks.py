"""The section `ranks`: processes that sample, and others that train."""

from __future__ import annotations

from grpo.config.model import ModelConfig
from grpo.config.objective import LossConfig
from grpo.config.rollout import RolloutConfig
from grpo.config.section import Positive, Section
from grpo.config.teacher import TeacherConfig


class RanksConfig(Section):
    sample: Positive
    """Processes that only sample and score. They work on the next step's prompts while this step's update is made."""
    train: Positive
    """Processes that only make updates. Two or more need a backend of MLX that makes groups of processes, which the
    ring is not."""

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.sample + self.train


def check_apart(model: ModelConfig, rollout: RolloutConfig, loss: LossConfig, teacher: TeacherConfig | None) -> None:
    """Raise ValueError for what a run does not do whose completions come from the policy of one step before."""
    if model.shard is not None:
        raise ValueError(
            "ranks gives each process a task of its own, and with model.shard several processes hold one model: leave "
            "one of them out"
        )
    if rollout.dynamic_sampling:
        raise ValueError(
            "rollout.dynamic_sampling takes prompts by the rewards of the step's earlier prompts, and with ranks the "
            "trainers do not know these while they work: leave one of them out"
        )
    if rollout.reuse:
        raise ValueError(
            "rollout.reuse learns from older completions where a step's own teach nothing, and with ranks all of them "
            "are a step old: leave one of them out"
        )
    if teacher is not None:
        raise ValueError(
            "a teacher corrects what the policy says now (on-policy distillation), and with ranks the completions are "
            "of the policy before its last update: leave one of them out"
        )
    if loss.kl_in == "reward":
        raise ValueError(
            "ranks: loss.kl_in: reward would take off a reward the KL of the policy that sampled, not of the policy "
            "that learns. Use kl_in: loss"
        )
    corrects = loss.importance_sampling_correction != "none"
    if loss.use is None and loss.preset.surrogate == "reinforce" and not corrects:
        raise ValueError(
            f"ranks: loss.type {loss.type} has no ratio, so it would learn from completions of the policy before its "
            "last update as if the policy of now had sampled them. Set loss.importance_sampling_correction (to "
            "token_truncate, say), or take a loss with a ratio, such as dapo"
        )
