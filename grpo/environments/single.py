"""The environment of a single turn: a prompt, and an answer to it."""

from __future__ import annotations

from grpo.environments.sampler import Sampler
from grpo.types import Task, Trajectory


class SingleTurn:
    """Answers to the task's prompt, and nothing after them."""

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        return await sampler.sample(task.prompt_ids, sampler.n)
