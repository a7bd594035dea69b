"""Environments that are given from Python: an object, a class, or a name that a recipe would use."""

from __future__ import annotations

from typing import Any

from grpo.door.checks import kind_of
from grpo.environments.environment import Environment, find_environment
from grpo.errors import UserError


def as_environment(given: Any, said_by: str) -> Environment:
    """The environment that was given; a class is called without arguments, and a text is a recipe's name for it.

    Raises UserError for a class or a name that makes none, and for an object without a method `rollout`.
    """
    if isinstance(given, str):
        return find_environment(given)
    environment: Any = given
    if isinstance(given, type):
        try:
            environment = given()
        except Exception as error:  # other people's code, before the run
            raise UserError(
                f"{said_by}: environment {given.__name__} cannot be made without arguments: {type(error).__name__}: "
                f"{error}. Give an object that you have made"
            ) from error
    if not callable(getattr(environment, "rollout", None)):
        raise UserError(
            f"{said_by}: environment: {kind_of(environment)} has no method rollout(task, sampler); give an object or "
            'a class with this method, or a name such as "file.py:Class"'
        )
    made: Environment = environment
    return made
