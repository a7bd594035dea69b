"""The tools of a conversation by the names that the model calls; mistakes in a recipe's `tools` by their entries."""

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
"""The method of a tool's class that is called when a conversation is over. (Of an environment it would be a tool.)"""


class ToolEntryError(UserError):
    """A mistake in an entry of `tools`. Its text begins with the entry's place, as `tools.0`."""


@dataclass(frozen=True, slots=True)
class Maker:
    """A class or function, and the recipe's arguments for it. `name` is how a tool that is a function is called."""

    make: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def makes_objects(self) -> bool:
        return inspect.isclass(self.make)


@dataclass(frozen=True, slots=True)
class Makers:
    """What each conversation's objects are made of: an environment, if there is one, and tools."""

    environment: Maker | None
    tools: Sequence[Maker] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """What a name that the model may call stands for.

    `owner` is the place among the recipe's tools, or None for the environment; `given` are the recipe's arguments.
    """

    function: Callable[..., Any]
    owner: int | None
    given: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def of_entry(place: int, doing: str = "") -> Iterator[None]:
    """What is raised here was raised for an entry of `tools`, by code that is not ours, while `doing` something."""
    try:
        yield
    except BaseException as error:  # SystemExit, too
        raise ToolEntryError(f"tools.{place}: {doing}{results.of_exception(error, tool=False).error}") from error


def tools_of(environment: Any, makers: Sequence[Maker], owned: Sequence[Any]) -> dict[str, Tool]:
    """By name: those of the recipe first, as TRL has it, then the environment's methods.

    `owned` are the objects of the recipe's tools that are classes, and None for functions. Raises ToolEntryError for an
    entry that offers nothing, for arguments that a function does not have, and for a name that is there already.
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
            f"tools.{place}: {type(instance).__name__}{place_of(type(instance))} has no public method, so it offers "
            "the model nothing to call"
        )
    return {name: Tool(getattr(instance, name), place) for name in names}


def _twice(place: int | None, name: str, other: str) -> str:
    return (
        f"tools.{place}: two tools are called {name!r}, one of this entry and one of {other}, and a model could not "
        "tell them apart: rename one"
    )
