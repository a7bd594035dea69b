"""What an environment that makes trajectories by itself is, and how it is found and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from grpo.environments.sampler import Sampler
from grpo.errors import UserError
from grpo.plugins import find_function
from grpo.types import Task, Trajectory


class Environment(Protocol):
    """Makes the trajectories of a task's group."""

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        """`sampler.n` trajectories of `task`.

        Rollouts of many tasks are under way at once, in one thread: while this one awaits something of the sampler's,
        the others go on. What it raises ends the run.
        """
        ...


def find_environment(use: str, kwargs: Mapping[str, Any] | None = None) -> Environment:
    """The environment that `file.py:Class` or `package.module:Class` makes with `kwargs`.

    Raises UserError for what cannot be imported or made, and for what has no method `rollout`.
    """
    make = find_function(use, "environment")
    try:
        environment: Environment = make(**(kwargs or {}))
    except Exception as error:  # other people's code, before the run
        raise UserError(f"environment {use!r}: it cannot be made: {type(error).__name__}: {error}") from error
    return checked(environment, f"environment {use!r}")


def checked(environment: Environment, what: str = "environment") -> Environment:
    """The same environment. Raises UserError for what has no method `rollout`, and for a class in an object's place."""
    if isinstance(environment, type):
        name = environment.__name__
        raise UserError(f"{what}: {name} is a class, and an object of it is needed: {name}()")
    if not callable(getattr(environment, "rollout", None)):
        raise UserError(
            f"{what}: {type(environment).__name__} has no method rollout(task, sampler): give it an "
            "`async def rollout(self, task, sampler)` that returns sampler.n trajectories"
        )
    return environment
