"""What an environment is, and those that have a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from grpo.environments.sampler import Sampler
from grpo.environments.single import SingleTurn
from grpo.errors import UserError, did_you_mean
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


ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    "single_turn": SingleTurn,
}
"""What `rollout.environment` may name. An environment of your own needs no line here: the recipe names its file."""


def find_environment(name: str) -> Environment:
    """The environment of that name, or the one that `file.py:Class` or `package.module:Class` makes without arguments.

    Raises UserError for what is neither, and for what has no method `rollout`.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]()
    if ":" not in name:
        known = ", ".join(ENVIRONMENTS)
        raise UserError(
            f"rollout.environment: there is no environment {name!r}.{did_you_mean(name, ENVIRONMENTS)} There is "
            f"{known}; your own: file.py:Class or package.module:Class"
        )
    make = find_function(name, "environment")
    try:
        environment: Environment = make()
    except Exception as error:  # other people's code, before the run
        raise UserError(f"environment {name!r}: it cannot be made: {type(error).__name__}: {error}") from error
    return checked(environment, f"environment {name!r}")


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
