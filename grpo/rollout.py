"""Tasks become groups of completions, by the generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from grpo.config import RolloutConfig
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.types import Group, Rollout, Task


class RolloutEngine:
    """Samples the policy: with logprobs for training, without for evaluation."""

    def __init__(self, generator: Generator, sampling: Sampling) -> None:
        self.generator = generator
        self.sampling = sampling

    def rollout(
        self,
        tasks: Sequence[Task],
        n: int,
        temperature: float,
        draws: mx.array | Sequence[int],
        logprobs: bool = True,
        phase: str = "rollout",
    ) -> list[Group]:
        """`n` completions of each task at `temperature` (0: greedy), as groups that are not scored yet.

        `draws` is a key for all of them, or a seed for each: then what is drawn for a task does not depend on the
        others. Greedy completions are the policy's own: no penalty reshapes them. `phase` is the name under which
        progress is told.
        """
        sampling = at_temperature(self.sampling, temperature)
        key, seeds = (draws, [None] * len(tasks)) if isinstance(draws, mx.array) else (mx.random.key(0), draws)
        requests = [Request(task.prompt_ids, n, seed) for task, seed in zip(tasks, seeds, strict=True)]
        answers = self.generator.generate(requests, sampling, key, logprobs, phase)
        return [
            Group(task, tuple(Rollout(trajectory) for trajectory in trajectories))
            for task, trajectories in zip(tasks, answers, strict=True)
        ]


def with_policy_step(groups: Sequence[Group], step: int) -> list[Group]:
    """The same groups, sampled by a policy that had made `step` training steps."""
    return [replace(group, rollouts=tuple(_at(rollout, step) for rollout in group.rollouts)) for group in groups]


def _at(rollout: Rollout, step: int) -> Rollout:
    return replace(rollout, trajectory=replace(rollout.trajectory, policy_step=step))


def at_temperature(sampling: Sampling, temperature: float) -> Sampling:
    """The same sampling at another temperature. Greedy (0) answers are the policy's own: nothing reshapes them."""
    if temperature == 0:
        sampling = replace(sampling, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    return replace(sampling, temperature=temperature)


def sampling_of(cfg: RolloutConfig) -> Sampling:
    """A recipe's sampling."""
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
