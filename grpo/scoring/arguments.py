"""The arguments of a reward function: those that grpo passes, those of the recipe's `kwargs`, and factories.

Worker processes import this module, so it imports nothing heavy.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

GIVEN = ("prompts", "completions", "completion_ids")
HOOKS = ("trainer_state", "log_extra", "log_metric")
"""Arguments that a function receives only if its signature accepts them."""
ENVIRONMENTS = "environments"
"""The argument with the environment of each completion. A function that takes it runs in the environments' process."""
_FROM_GRPO = (*GIVEN, *HOOKS, ENVIRONMENTS)


def is_factory(function: Callable[..., Any]) -> bool:
    """Whether `function` is a factory of reward functions: a class, or a function without `prompts`, `completions`,
    `completion_ids`, `environments` and `**kwargs` among its parameters."""
    if inspect.isclass(function):
        return True
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return False
    return not any(name in parameters for name in (*GIVEN, ENVIRONMENTS)) and not _takes_everything(parameters)


def check_kwargs(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that the function's signature does not name, or of a type that it excludes."""
    if not kwargs:
        return
    parameters = inspect.signature(function).parameters
    named = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    settable = [name for name in named if name not in _FROM_GRPO]
    for name, value in kwargs.items():
        if name not in settable:
            close = difflib.get_close_matches(name, settable, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else f" Its arguments: {', '.join(settable) or 'none'}."
            raise ValueError(f"kwargs.{name}: there is no such argument.{meant}")
        _check_type(name, value, _annotation(function, name))


def made(factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The reward function that a factory returns for `kwargs`. Raises ValueError if the factory fails."""
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"kwargs: {error}") from None
    try:
        made = factory(**kwargs)
    except ValueError:
        raise
    except Exception as error:  # other people's code, before the run
        raise ValueError(f"the factory raised {type(error).__name__}: {error}") from error
    if not callable(made):
        raise ValueError(
            "it takes neither completions nor **kwargs, so grpo called it as a factory with the recipe's kwargs. A "
            f"factory must return a reward function; this one returned {made!r:.80}"
        )
    return made  # type: ignore[no-any-return]


def taker(function: Callable[..., Any]) -> Callable[[str], bool]:
    """A predicate that says whether the function takes an argument of a given name."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return lambda _: True
    everything = _takes_everything(parameters)
    return lambda name: everything or name in parameters


def takes_environments(function: Callable[..., Any]) -> bool:
    """Whether a function takes `environments`: as a parameter, or as a key that its code reads from `**kwargs`."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return False
    if ENVIRONMENTS in parameters or not _takes_everything(parameters):
        return ENVIRONMENTS in parameters
    called = inspect.unwrap(function)
    code = getattr(called, "__code__", None) or getattr(type(called).__call__, "__code__", None)
    return ENVIRONMENTS in getattr(code, "co_consts", ())


def _annotation(function: Callable[..., Any], name: str) -> Any:
    import typing

    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # names that only exist for type checkers
        return Any
    return hints.get(name, Any)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    if annotation is Any:
        return
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the type has its own pydantic configuration
        adapter = TypeAdapter(annotation)
    try:
        adapter.validate_json(_json(value), strict=True)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].replace("Input should be", "expected", 1)
        raise ValueError(f"kwargs.{name}: {expected}, got {_json(value)}") from None


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _takes_everything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
