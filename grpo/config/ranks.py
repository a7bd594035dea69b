"""The section `ranks`: separate processes for sampling and training."""

from __future__ import annotations

from grpo.config.model import ModelConfig
from grpo.config.objective import LossConfig
from grpo.config.rollout import RolloutConfig
from grpo.config.section import Positive, Section
from grpo.config.teacher import TeacherConfig


class RanksConfig(Section):
    sample: Positive
    """Number of processes that only sample and score. They work on the next step's prompts while the other processes
    make this step's update."""
    train: Positive
    """Number of processes that only make updates. Two or more need an MLX backend that can form groups of processes.
    The ring backend cannot."""

    @property
    def size(self) -> int:
        """Total number of processes."""
        return self.sample + self.train


def check_apart(model: ModelConfig, rollout: RolloutConfig, loss: LossConfig, teacher: TeacherConfig | None) -> None:
    """Raise ValueError for settings that do not work if completions come from the previous step's policy."""
    if model.shard is not None:
        raise ValueError(
            "ranks gives each process its own task, but with model.shard several processes share one model: leave "
            "one of them out"
        )
    if rollout.dynamic_sampling:
        raise ValueError(
            "rollout.dynamic_sampling chooses prompts by the rewards of the step's earlier prompts, but with ranks the "
            "trainers do not know these rewards while they work: leave one of them out"
        )
    if rollout.reuse:
        raise ValueError(
            "rollout.reuse trains on older completions if a step's own completions teach nothing, but with ranks all "
            "completions are one step old: leave one of them out"
        )
    if teacher is not None:
        raise ValueError(
            "a teacher corrects completions of the current policy (on-policy distillation), but with ranks the "
            "completions come from the policy before its last update: leave one of them out"
        )
    if loss.kl_in == "reward":
        raise ValueError(
            "ranks: loss.kl_in: reward would subtract the KL of the policy that sampled, not of the policy that "
            "learns. Use loss.kl_in: loss"
        )
    corrects = loss.importance_sampling_correction != "none"
    if loss.use is None and loss.preset.surrogate == "reinforce" and not corrects:
        raise ValueError(
            f"ranks: loss.type {loss.type} has no ratio, so it would treat completions of the policy before its last "
            "update as completions of the current policy. Set loss.importance_sampling_correction, for example to "
            "token_truncate, or use a loss with a ratio, such as dapo"
        )
