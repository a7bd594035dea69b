"""The tools of a conversation, by the names that the model calls, and errors that name an entry of `tools`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.environments import results
from grpo.environments.describe import methods_of, place_of
from grpo.errors import UserError

CLOSE = "close"
"""The method of a tool's class that is called when a conversation ends. (An environment's `close` is a tool.)"""


class ToolEntryError(UserError):
    """A mistake in an entry of `tools`. The message begins with the entry's place, such as `tools.0`."""


@dataclass(frozen=True, slots=True)
class Maker:
    """A class or function, with the recipe's arguments for it. `name` is the tool's name if the tool is a function."""

    make: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def makes_objects(self) -> bool:
        return inspect.isclass(self.make)


@dataclass(frozen=True, slots=True)
class Makers:
    """What makes the objects of each conversation: an optional environment, and tools."""

    environment: Maker | None
    tools: Sequence[Maker] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    `owner` is the index among the recipe's tools, or None for the environment; `given` are the recipe's arguments.
    """

    function: Callable[..., Any]
    owner: int | None
    given: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def of_entry(place: int, doing: str = "") -> Iterator[None]:
    """Turn an exception of user code into a ToolEntryError for entry `place` of `tools`. `doing` says during what."""
    try:
        yield
    except BaseException as error:  # SystemExit, too
        raise ToolEntryError(f"tools.{place}: {doing}{results.of_exception(error, tool=False).error}") from error


def tools_of(environment: Any, makers: Sequence[Maker], owned: Sequence[Any]) -> dict[str, Tool]:
    """Return the tools by name: the recipe's tools first, as in TRL, then the environment's methods.

    `owned` has an object for each of the recipe's tools that is a class, and None for each function. Raises
    ToolEntryError for an entry that offers no tool, for arguments that a function does not have, and for a name that is
    used twice.
    """
    found: dict[str, Tool] = {}
    for place, (maker, instance) in enumerate(zip(makers, owned, strict=True)):
        offered = _of_function(place, maker) if instance is None else _of_object(place, instance)
        for name, tool in offered.items():
            if name in found:
                raise ToolEntryError(_twice(place, name, f"tools.{found[name].owner}"))
            found[name] = tool
    for name in [] if environment is None else methods_of(environment):
        if name in found:
            raise ToolEntryError(_twice(found[name].owner, name, f"the environment ({type(environment).__name__})"))
        found[name] = Tool(getattr(environment, name), None)
    return found


def _of_function(place: int, maker: Maker) -> dict[str, Tool]:
    with contextlib.suppress(ValueError):  # a builtin without a signature
        try:
            inspect.signature(maker.make).bind_partial(**maker.kwargs)
        except TypeError as error:
            raise ToolEntryError(f"tools.{place}.kwargs: {maker.name}{place_of(maker.make)} {error}") from None
    return {maker.name: Tool(maker.make, place, maker.kwargs)}


def _of_object(place: int, instance: Any) -> dict[str, Tool]:
    names = [name for name in methods_of(instance) if name != CLOSE]
    if not names:
        raise ToolEntryError(
            f"tools.{place}: {type(instance).__name__}{place_of(type(instance))} has no public method for the model to "
            "call"
        )
    return {name: Tool(getattr(instance, name), place) for name in names}


def _twice(place: int | None, name: str, other: str) -> str:
    return (
        f"tools.{place}: two tools are named {name!r}, one in this entry and one in {other}. The model could not tell "
        "them apart: rename one of them"
    )
