"""Tasks become groups of completions, by the generator."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.types import Group, Rollout, Task


class RolloutEngine:
    """Samples the policy: with logprobs for training, without for evaluation."""

    def __init__(self, generator: Generator, max_completion_length: int) -> None:
        self.generator = generator
        self.max_completion_length = max_completion_length

    def rollout(
        self, tasks: Sequence[Task], n: int, temperature: float, key: mx.array, logprobs: bool = True
    ) -> list[Group]:
        """`n` completions of each task at `temperature` (0: greedy), as groups that are not scored yet."""
        sampling = Sampling(temperature, self.max_completion_length)
        requests = [Request(task.prompt_ids, n) for task in tasks]
        answers = self.generator.generate(requests, sampling, key, logprobs)
        return [
            Group(task, tuple(Rollout(completion) for completion in completions))
            for task, completions in zip(tasks, answers, strict=True)
        ]
