"""The single-turn environment: a prompt and an answer."""

from __future__ import annotations

from grpo.environments.sampler import Sampler
from grpo.types import Task, Trajectory


class SingleTurn:
    """Samples one answer to the task's prompt per trajectory."""

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        return await sampler.sample(task.prompt_ids, sampler.n)
