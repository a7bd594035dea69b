"""The protocol for environments that make whole trajectories, with the functions that load and check them."""

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
        """Return `sampler.n` trajectories of `task`.

        The rollouts of many tasks share one thread: while this rollout awaits a method of the sampler, the others
        continue. An exception ends the run.
        """
        ...


def find_environment(use: str, kwargs: Mapping[str, Any] | None = None) -> Environment:
    """Return the environment that `file.py:Class` or `package.module:Class` creates when called with `kwargs`.

    Raises UserError if the class cannot be imported or created, or if the object has no method `rollout`.
    """
    make = find_function(use, "environment")
    try:
        environment: Environment = make(**(kwargs or {}))
    except Exception as error:  # user code, before the run
        raise UserError(f"environment {use!r}: cannot be created: {type(error).__name__}: {error}") from error
    return checked(environment, f"environment {use!r}")


def checked(environment: Environment, what: str = "environment") -> Environment:
    """Return `environment` unchanged. Raises UserError if it is a class, or has no method `rollout`."""
    if isinstance(environment, type):
        name = environment.__name__
        raise UserError(f"{what}: {name} is a class: pass an instance, {name}()")
    if not callable(getattr(environment, "rollout", None)):
        raise UserError(
            f"{what}: {type(environment).__name__} has no method rollout(task, sampler): give it an "
            "`async def rollout(self, task, sampler)` that returns sampler.n trajectories"
        )
    return environment
