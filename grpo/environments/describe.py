"""TRL's contract for environments and tools: which of their functions the model may call, and with which schemas.

See `environment_factory` and `tools` of TRL's `GRPOTrainer`. Worker processes import this module.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from types import FunctionType, MethodType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from grpo.backend.imports import alone
from grpo.environments.agent import RUN, Agent
from grpo.environments.seats import Description
from grpo.errors import UserError

EnvironmentKind = Literal["tools", "messages", "text", "rollout", "agent"]
RESERVED = ("reset", "get_reward")
"""Public methods that are not tools."""
ANSWERS: Mapping[str, EnvironmentKind] = {"message": "messages", "text": "text"}
"""Kind of environment by the name of the only parameter of `step`, if `step` answers as a user."""


def kind_of(environment: Any) -> EnvironmentKind:
    """Return the kind of an environment, which decides who acts after the model's turn."""
    if isinstance(environment, Agent):
        return "agent"
    if inspect.iscoroutinefunction(getattr(environment, "rollout", None)):
        return "rollout"
    if "step" not in _public(environment):
        return "tools"
    parameters = list(inspect.signature(environment.step).parameters.values())
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return "tools"
    return ANSWERS.get(parameters[0].name, "tools")


def methods_of(instance: Any) -> list[str]:
    """Return the sorted names of the methods that are tools.

    An environment of kind `text` has no tools: the model talks to it in plain text.
    """
    kind = kind_of(instance)
    if kind == "agent":  # called by the trainer, not by the model
        return [RUN]
    if kind in ("text", "rollout"):
        return []
    return [name for name in _public(instance) if name not in RESERVED and not (name == "step" and kind != "tools")]


def _public(instance: Any) -> list[str]:
    """Names of the class's public functions (also inherited, static, and class methods) and of methods that are bound
    to this object only."""
    kind = type(instance)
    of_class = [
        name
        for name in dir(kind)
        if isinstance(inspect.getattr_static(kind, name, None), FunctionType | staticmethod | classmethod)
    ]
    bound = [name for name, value in getattr(instance, "__dict__", {}).items() if isinstance(value, MethodType)]
    return sorted(name for name in {*of_class, *bound} if not name.startswith("_"))


def schema_of(name: str, function: Callable[..., Any], hidden: Collection[str], owner: str = "") -> dict[str, Any]:
    """Return the JSON schema of a tool, without the arguments that the recipe sets (`hidden`).

    `owner` is the tool's place in the recipe; empty for a method of the environment. Raises UserError if a type hint or
    a description is missing; the message names the argument.
    """
    get_json_schema = _schema_maker()
    try:
        schema: dict[str, Any] = get_json_schema(_without(function, hidden) if hidden else function)
    except Exception as error:  # several types, and any type from a hint that cannot be resolved
        lacks = str(error).removeprefix(f"Cannot generate JSON schema for {name} because ").rstrip("!. ")
        first = next((one for one in _parameters(function) if one not in hidden), "place")
        private = "" if owner else ". If the model must not call it, start its name with an underscore"
        raise UserError(
            f"{owner and f'{owner}: '}the tool {name!r}{place_of(function)} has no schema: {lacks}. A tool needs a "
            "type hint for each argument, and a docstring that describes the tool and, under a line `Args:`, each "
            f"argument, for example `{first}: The {first} to look up.`{private}"
        ) from None
    schema["function"]["name"] = name
    return schema


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:  # a builtin without a signature
        return []


def place_of(code: Callable[..., Any]) -> str:
    """Return ` (FILE:LINE)` of a function or class; an empty string if its place is unknown."""
    try:
        plain = inspect.unwrap(code)
        return f" ({inspect.getsourcefile(plain)}:{inspect.getsourcelines(plain)[1]})"
    except (OSError, TypeError, ValueError):  # written in C, without a file, or a callable object
        return ""


@functools.cache
def _schema_maker() -> Callable[[Callable[..., Any]], dict[str, Any]]:
    """Return transformers' `get_json_schema`.

    The import skips the advice to install PyTorch, which schemas do not need. It also takes a third of the time of a
    plain import, and every environment process starts with it.
    """
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    was_set = quiet in os.environ
    os.environ.setdefault(quiet, "1")
    maker: Callable[[Callable[..., Any]], dict[str, Any]]
    maker = alone("transformers.utils.chat_template_utils").get_json_schema
    if not was_set:
        del os.environ[quiet]
    return maker


def _without(function: Callable[..., Any], hidden: Collection[str]) -> Callable[..., Any]:
    """Return a stand-in with the same signature except for the `hidden` parameters. Not for calls."""

    def shown(**_: Any) -> None: ...

    signature = inspect.signature(function)
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in hidden]
    shown.__name__ = getattr(function, "__name__", "tool")
    shown.__doc__ = inspect.getdoc(function)
    hints = inspect.get_annotations(inspect.unwrap(function), eval_str=True)
    shown.__annotations__ = {name: hint for name, hint in hints.items() if name not in hidden}
    shown.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return shown


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether `function` has a parameter `name` that can be passed by keyword."""
    try:
        parameter = inspect.signature(function).parameters.get(name)
    except ValueError:  # a builtin without a signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def reset_problem(reset: Callable[..., Any], columns: Collection[str]) -> str | None:
    """Return why `reset` cannot be called with these columns; None if it can."""
    given = {*columns, *(("seed",) if takes(reset, "seed") else ())}
    try:
        inspect.signature(reset).bind(**dict.fromkeys(given))
    except ValueError:
        return None
    except TypeError as error:
        return f"reset: {error}; it is called with all columns: {', '.join(sorted(columns))} (take **_ for the rest)"
    return None


def describe(
    name: str | None, environment: Any, schemas: list[dict[str, Any]], tools: Mapping[str, Callable[..., Any]]
) -> Description:
    """Return the description of an environment (None: tools only). `tools` maps names to functions."""
    called = {**tools, "step": environment.step} if kind_of(environment) in ANSWERS.values() else tools
    steps = [which for which, function in called.items() if may_return_step(function)]
    if environment is None:
        return Description(name or "tools", "tools", schemas, steps=steps)
    if isinstance(environment, Agent):
        return Description(name or "agent", "agent", rewards=True, resets=True)
    return Description(
        name or type(environment).__name__,
        kind_of(environment),
        schemas,
        callable(getattr(environment, "get_reward", None)),
        callable(getattr(environment, "reset", None)),
        _withheld(environment),
        steps,
    )


PLAIN = (str, int, float, complex, bool, bytes, list, tuple, set, dict, type(None), None)
"""Result types that are not a `Step`."""


def may_return_step(function: Callable[..., Any]) -> bool:
    """Whether a function may return a `Step`: true unless its return annotation names only plain types."""
    try:
        hint: Any = inspect.get_annotations(inspect.unwrap(function), eval_str=True)["return"]
    except Exception:  # no annotation, or an annotation that cannot be resolved
        return True
    parts: Sequence[Any] = get_args(hint) if _is_union(get_origin(hint)) else [hint]
    return any((get_origin(part) or part) not in PLAIN for part in parts)


def _is_union(origin: Any) -> bool:
    return origin is Union or origin is UnionType


def _withheld(environment: Any) -> list[str]:
    """Methods that look like tools, of an environment that has no tools because of its `step(text)`."""
    if kind_of(environment) != "text":
        return []
    return [
        name for name in _public(environment) if name not in (*RESERVED, "step") and getattr(environment, name).__doc__
    ]
