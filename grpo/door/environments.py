"""Environments and tools passed from Python: classes, functions and objects, or names as in recipes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grpo.door.checks import kind_of
from grpo.environments.environment import Environment, checked, find_environment
from grpo.errors import UserError
from grpo.plugins import Function
from grpo.runs.given import name_of

Sections = dict[str, Any]


def as_environment(given: Any, said_by: str) -> Environment:
    """Return an environment with a method `rollout`. A class is called without arguments; a string is a name as in a
    recipe.

    Raises UserError for a class or name that cannot be created, and for an object without a method `rollout`.
    """
    if isinstance(given, str):
        return find_environment(given)
    environment: Environment = given
    if isinstance(given, type):
        try:
            environment = given()
        except Exception as error:  # user code, before the run
            raise UserError(
                f"{said_by}: environment {given.__name__} cannot be created without arguments: {type(error).__name__}: "
                f"{error}. Pass an instance instead"
            ) from error
    return checked(environment, f"{said_by}: environment")


def partner_sections(
    environment: Any, environments: Any, tools: Any, functions: dict[str, Function], said_by: str
) -> Sections:
    """Return the recipe's settings for the arguments; None keeps the recipe's values. Objects go into `functions`.

    Raises UserError for a value that is neither an environment nor a tool.
    """
    settings: Sections = {}
    if environment is not None and environments is not None:
        raise UserError(
            f"{said_by}: environment has no effect together with environments: move it there, or remove one of them"
        )
    if environment is not None:
        own = _section(environment, functions, f"{said_by}: environment")
        others: Sections = {"use": None, "agent": None, "command": None, "kwargs": {}}  # clear the recipe's values
        settings |= {f"environment.{name}": value for name, value in {**others, **own}.items()}
        settings["environments"] = {}
    if environments is not None:
        if not isinstance(environments, Mapping):
            raise UserError(f"{said_by}: environments: expected a dict of classes by name, got {kind_of(environments)}")
        where = f"{said_by}: environments"
        settings["environments"] = {
            name: _section(given, functions, f"{where}[{name!r}]") for name, given in environments.items()
        }
        settings["environment"] = None
    if tools is not None:
        if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
            raise UserError(f"{said_by}: tools: expected a list of functions, classes and names, got {kind_of(tools)}")
        settings["tools"] = tuple(_section(given, functions, f"{said_by}: tools", tool=True) for given in tools)
    return settings


def _section(
    given: Any, functions: dict[str, Function], what: str, tool: bool = False, setting: str = "use"
) -> Sections:
    """Return a section of the recipe. An object gets a name, which becomes `setting`, and is added to `functions`."""
    if isinstance(given, Mapping):
        if not tool and "command" in given:
            return dict(given)
        setting = "agent" if not tool and "agent" in given else "use"
        if setting not in given:
            raise UserError(f"{what}: expected a dict with use, as in a recipe, got a dict with {', '.join(given)}")
        return {**given, **_section(given[setting], functions, what, tool, setting)}
    if isinstance(given, str):
        return {setting: given}
    if not tool and hasattr(given, "rollout"):
        given = as_environment(given, what.partition(":")[0])
        kind: Any = type(given)
    elif callable(given):
        kind = given
    else:
        wanted = "a function, a class" if tool else "a class, a function that creates an object"
        own = "" if tool else ", an object with a method rollout(task, sampler)"
        raise UserError(f'{what}: expected {wanted}{own}, or a name such as "file.py:name", got {kind_of(given)}')
    use = name_of(kind, functions)
    functions[use] = given
    return {setting: use}
