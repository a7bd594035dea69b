"""Environments with a method `rollout` that are given from Python: an object, a class, or a name as in recipes."""

from __future__ import annotations

from typing import Any

from grpo.environments.environment import Environment, checked, find_environment
from grpo.errors import UserError


def as_environment(given: Any, said_by: str) -> Environment:
    """The environment that was given; a class is called without arguments, and a text is a recipe's name for it.

    Raises UserError for a class or a name that makes none, and for an object without a method `rollout`.
    """
    if isinstance(given, str):
        return find_environment(given)
    environment: Environment = given
    if isinstance(given, type):
        try:
            environment = given()
        except Exception as error:  # other people's code, before the run
            raise UserError(
                f"{said_by}: environment {given.__name__} cannot be made without arguments: {type(error).__name__}: "
                f"{error}. Give an object that you have made"
            ) from error
    return checked(environment, f"{said_by}: environment")
