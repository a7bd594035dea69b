"""The work of training benchmarks: a recipe, prompts, completions and their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.random import derive_key, derive_seed
from grpo.benchmark.models import vocabulary_of
from grpo.benchmark.setting import Setting
from grpo.config import AdapterConfig, OptimConfig, Recipe
from grpo.errors import UserError
from grpo.model.adapters import Adapters
from grpo.model.policy import Policy
from grpo.types import Group, Rollout, Task, Trajectory


def recipe(setting: Setting, optim: dict[str, Any]) -> Recipe:
    """The recipe of training benchmarks: LoRA of rank 16 on every linear layer, AdamW, no KL penalty."""
    if setting.completions < 2:
        raise UserError("--completions 1: GRPO compares the completions of a prompt, so it needs at least 2")
    decided = {"micro_batch_tokens": 8192, "gradient_checkpointing": False}
    return Recipe.model_validate(
        {
            "model": {"name": setting.name},
            "data": {"source": "bench"},
            "rewards": [{"use": "bench"}],
            "rollout": {
                "prompts_per_step": setting.prompts,
                "num_generations": setting.completions,
                "max_completion_length": setting.completion_length,
                "max_concurrency": setting.rows,
            },
            "optim": {"steps": 999_999, "learning_rate": 1e-5, **decided, **optim},
        },
        strict=False,
    )


def policy_of(model: nn.Module, optim: OptimConfig) -> Policy:
    """A policy of a model without an adapter, with a new adapter."""
    adapters = Adapters(model, AdapterConfig(), mx.random.key(0))
    return Policy(model, adapters, 1.0, optim.share_prompts, optim.gradient_checkpointing is True)


WEIGHTS = {"even": 1.0}
"""Weights of the rewards of `synthetic` completions."""


def synthetic(setting: Setting, model: nn.Module) -> list[Group]:
    """Groups of random prompts and completions of full length, with different rewards."""
    made, vocabulary = [], vocabulary_of(model)
    for number, prompt in enumerate(setting.draw(vocabulary)):
        shape = (setting.completions, setting.completion_length)
        ids: Any = mx.random.randint(1, vocabulary, shape, key=derive_key(0, "completions", number)).tolist()
        rollouts = tuple(
            Rollout(Trajectory.sampled(tuple(row), (0.0,) * len(row), "", "length"), {"even": _drawn(number, i)})
            for i, row in enumerate(ids)
        )
        made.append(Group(Task(number, "", tuple(prompt), {}), rollouts))
    return made


def _drawn(*position: int) -> float:
    return derive_seed(0, "reward", *position) / 2**64


class Prompts:
    """A `Source` with the same prompts at every step."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = list(tasks)

    def take(self, n: int) -> list[Task]:
        return self._tasks[:n]

    def observe(self, groups: Sequence[Group]) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {"dropped_prompts": 0.0}

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: Mapping[str, int]) -> None:
        pass
