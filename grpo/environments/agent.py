"""Agents in their process: functions that call the model through an endpoint and return the reward.

Worker processes import this module. A `Chair` holds an agent as it holds an environment: the agent has `reset`, which
stores the row, and one other method, `run`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo.environments.results import WrongResultError, number_of, of_exception, shortened
from grpo.plugins import Located

GIVEN = ("data", "base_url", "api_key")
"""Arguments of an agent's function in addition to the columns: the whole row, and the model's endpoint."""
SEED = "seed"
RUN = "run"
"""The method that is called, in the way in which tools are called."""


class Agent:
    """Base class of agents. `run` is called once after each `reset`."""

    def reset(self, **row: Any) -> None:
        self.row = row

    def run(self, base_url: str, api_key: str, seed: int) -> Any:
        """Return the reward and the metrics as `told` writes them, or an awaitable of them."""
        raise NotImplementedError

    def problem(self, columns: Collection[str]) -> str | None:
        """Return why the agent cannot run with rows of these columns; None if it can."""
        raise NotImplementedError


class FunctionAgent(Agent):
    """Calls a synchronous or asynchronous function with those of the arguments that its signature has.

    The recipe's arguments override columns of the same name. `seed` is passed unless a column has this name.
    """

    def __init__(self, function: Callable[..., Any], **kwargs: Any) -> None:
        self._function, self._kwargs = function, kwargs

    def run(self, base_url: str, api_key: str, seed: int) -> Any:
        ours = {"data": self.row, "base_url": base_url, "api_key": api_key}
        given = {SEED: seed, **self.row, **self._kwargs, **ours}
        taken = _taken(self._function)
        arguments = given if taken is None else {name: value for name, value in given.items() if name in taken}
        try:
            value = self._function(**arguments)
            return self._awaited(value) if inspect.isawaitable(value) else told(value)
        except (Exception, SystemExit) as error:
            raise self._raised(error) from error

    def problem(self, columns: Collection[str]) -> str | None:
        taken = _taken(self._function)
        if taken is None:
            taken = {*columns, *self._kwargs, *GIVEN, SEED}
        wanted = "write async def run(data, base_url, api_key, **columns)"
        for name in ("base_url", "api_key"):
            if name not in taken:
                return f"{self._name} has no parameter {name}, so it cannot call the model: {wanted}"
        for name in self._kwargs:
            if name in GIVEN or name not in taken:
                why = "grpo sets this argument itself" if name in GIVEN else f"{self._name} has no such argument"
                return f"kwargs.{name}: {why}"
        given = {*columns, *self._kwargs, *GIVEN, SEED} & taken
        try:
            inspect.signature(self._function).bind(**dict.fromkeys(given))
        except ValueError:  # a builtin without a signature
            return None
        except TypeError as error:
            return f"{self._name}: {error}; {wanted}; the columns are {', '.join(sorted(columns))}"
        return None

    @property
    def _name(self) -> str:
        return getattr(self._function, "__name__", type(self._function).__name__)

    async def _awaited(self, value: Awaitable[Any]) -> str:
        try:
            return told(await value)
        except asyncio.CancelledError:  # the call was given up
            raise
        except (Exception, SystemExit) as error:
            raise self._raised(error) from error

    def _raised(self, error: BaseException) -> WrongResultError:
        """Return the error with its type and its line in the agent's file as the message. `run` is called like a tool,
        and the error of a tool is only its message."""
        if isinstance(error, WrongResultError):
            return error
        module = sys.modules.get(getattr(self._function, "__module__", None) or "")
        return WrongResultError(of_exception(error, tool=False, file=getattr(module, "__file__", None)).error)


@dataclass(frozen=True, slots=True)
class AgentAt:
    """The place of an agent's function. `load` returns a maker of agents that call it."""

    located: Located

    def load(self) -> Callable[..., Agent]:
        """Import the function. Raises UserError as `find_function` does."""
        return partial(FunctionAgent, self.located.load())


def told(value: Any) -> str:
    """Convert an agent's return value to JSON: `{"reward": number or null, "metrics": {name: number}}`.

    A number is the reward, and None means no reward. A mapping has the reward under `reward` and metrics under other
    names. Raises WrongResultError for anything else, and for numbers that are not finite.
    """
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        raise WrongResultError("it is a generator: use `return` for the reward instead of `yield`")
    if not isinstance(value, Mapping):
        return _written(number_of(value, "the returned reward"), {})
    if "reward" not in value:
        has = ", ".join(map(str, value)) or "nothing"
        raise WrongResultError(f"it returned a dict without 'reward'; the dict has {has}")
    metrics = {}
    for name, one in value.items():
        if not isinstance(name, str) or not name:
            raise WrongResultError(f"it returned a metric named {shortened(name)}: names must be nonempty strings")
        if name != "reward" and (number := number_of(one, f"the metric {name!r}")) is not None:
            metrics[name] = number
    return _written(number_of(value["reward"], "the reward"), metrics)


def _written(reward: float | None, metrics: Mapping[str, float]) -> str:
    return json.dumps({"reward": reward, "metrics": metrics})


def _taken(function: Callable[..., Any]) -> set[str] | None:
    """Return the names of the parameters that can be passed by keyword; None if the function takes any, or if its
    signature is unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
