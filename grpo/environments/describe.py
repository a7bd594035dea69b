"""TRL's contract for environments and tools: which of their functions the model may call, and by which schemas.

See `environment_factory` and `tools` of TRL's `GRPOTrainer`. Worker processes import this.
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
"""Public methods that are no tools."""
ANSWERS: Mapping[str, EnvironmentKind] = {"message": "messages", "text": "text"}
"""What `step` is called with, if it answers as a user does, by the name of its only parameter."""


def kind_of(environment: Any) -> EnvironmentKind:
    """Who has the next word in a conversation with this environment."""
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
    """The names of the methods that are tools, sorted.

    An environment of text is spoken to in text alone: none of its methods is a tool.
    """
    kind = kind_of(instance)
    if kind == "agent":  # the trainer calls it, and no model
        return [RUN]
    if kind in ("text", "rollout"):
        return []
    return [name for name in _public(instance) if name not in RESERVED and not (name == "step" and kind != "tools")]


def _public(instance: Any) -> list[str]:
    """Public functions of the class, inherited, static and class methods too, and methods bound to the object alone."""
    kind = type(instance)
    of_class = [
        name
        for name in dir(kind)
        if isinstance(inspect.getattr_static(kind, name, None), FunctionType | staticmethod | classmethod)
    ]
    bound = [name for name, value in getattr(instance, "__dict__", {}).items() if isinstance(value, MethodType)]
    return sorted(name for name in {*of_class, *bound} if not name.startswith("_"))


def schema_of(name: str, function: Callable[..., Any], hidden: Collection[str], owner: str = "") -> dict[str, Any]:
    """The JSON schema of a tool, without the arguments that the recipe gives (`hidden`).

    Raises UserError if hints or descriptions are missing, and says of what. `owner` is where the recipe names it, empty
    for a method of the environment.
    """
    get_json_schema = _schema_maker()
    try:
        schema: dict[str, Any] = get_json_schema(_without(function, hidden) if hidden else function)
    except Exception as error:  # of several kinds, and those of hints that cannot be resolved
        lacks = str(error).removeprefix(f"Cannot generate JSON schema for {name} because ").rstrip("!. ")
        first = next((one for one in _parameters(function) if one not in hidden), "place")
        private = "" if owner else ". If the model is not to call it, let its name begin with an underscore"
        raise UserError(
            f"{owner and f'{owner}: '}the tool {name!r}{place_of(function)} has no schema: {lacks}. A tool needs a "
            "type hint for each argument, and a docstring that says what it does and, under a line `Args:`, what each "
            f"argument is, for example `{first}: The {first} to look up.`{private}"
        ) from None
    schema["function"]["name"] = name
    return schema


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:  # a builtin without a signature
        return []


def place_of(code: Callable[..., Any]) -> str:
    """` (FILE:LINE)` of a function or class; nothing where that is not known."""
    try:
        plain = inspect.unwrap(code)
        return f" ({inspect.getsourcefile(plain)}:{inspect.getsourcelines(plain)[1]})"
    except (OSError, TypeError, ValueError):  # of C, of no file, of a callable object
        return ""


@functools.cache
def _schema_maker() -> Callable[[Callable[..., Any]], dict[str, Any]]:
    """The function of transformers, imported without its advice to install PyTorch, which schemas do not need, and in a
    third of the time: a process of environments starts with it."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    was_set = quiet in os.environ
    os.environ.setdefault(quiet, "1")
    maker: Callable[[Callable[..., Any]], dict[str, Any]]
    maker = alone("transformers.utils.chat_template_utils").get_json_schema
    if not was_set:
        del os.environ[quiet]
    return maker


def _without(function: Callable[..., Any], hidden: Collection[str]) -> Callable[..., Any]:
    """A function that looks like this one without some of its parameters. It is for its signature, not for calls."""

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
    """Whether the signature names a parameter that can be given by keyword."""
    try:
        parameter = inspect.signature(function).parameters.get(name)
    except ValueError:  # a builtin without a signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def reset_problem(reset: Callable[..., Any], columns: Collection[str]) -> str | None:
    """Why `reset` could not be called with these columns; None if it can be."""
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
    """What is told of an environment, which is None if there are tools alone. `tools` are the functions by name."""
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
"""Types of results that are no `Step`."""


def may_return_step(function: Callable[..., Any]) -> bool:
    """Whether a function may return a `Step`: its return annotation does not name plain types alone."""
    try:
        hint: Any = inspect.get_annotations(inspect.unwrap(function), eval_str=True)["return"]
    except Exception:  # there is none, or it cannot be resolved
        return True
    parts: Sequence[Any] = get_args(hint) if _is_union(get_origin(hint)) else [hint]
    return any((get_origin(part) or part) not in PLAIN for part in parts)


def _is_union(origin: Any) -> bool:
    return origin is Union or origin is UnionType


def _withheld(environment: Any) -> list[str]:
    """Methods that look like tools of an environment that has none because of its `step(text)`."""
    if kind_of(environment) != "text":
        return []
    return [
        name for name in _public(environment) if name not in (*RESERVED, "step") and getattr(environment, name).__doc__
    ]
