"""Agents where they live: functions that ask the model through an endpoint, and return the reward.

Worker processes import this. A `Chair` holds an agent as it holds an environment: it has `reset`, which keeps the row,
and one method, `run`.
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
"""What an agent's function is called with beside the columns: the whole row, and where the model is to be asked."""
SEED = "seed"
RUN = "run"
"""The one method that is called, as tools are."""


class Agent:
    """What all agents have in common. `run` is called once after each `reset`."""

    def reset(self, **row: Any) -> None:
        self.row = row

    def run(self, base_url: str, api_key: str, seed: int) -> Any:
        """The reward and the metrics, as `told` writes them, at once or when awaited."""
        raise NotImplementedError

    def problem(self, columns: Collection[str]) -> str | None:
        """Why it could not run with rows of these columns; None if it can."""
        raise NotImplementedError


class FunctionAgent(Agent):
    """Calls a function, synchronous or not, with the row and its columns, as far as the signature takes them.

    The recipe's arguments come before columns of the same name; `seed` is given where no column is called so.
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
                return f"{self._name} takes no {name}, and could not ask the model: {wanted}"
        for name in self._kwargs:
            if name in GIVEN or name not in taken:
                why = "is not the recipe's to give" if name in GIVEN else f"{self._name} has no such argument"
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
        except asyncio.CancelledError:  # it was given up
            raise
        except (Exception, SystemExit) as error:
            raise self._raised(error) from error

    def _raised(self, error: BaseException) -> WrongResultError:
        """The same error, with its type and the line of the agent's own file in words: `run` is called as tools are,
        whose errors are their message alone."""
        if isinstance(error, WrongResultError):
            return error
        module = sys.modules.get(getattr(self._function, "__module__", None) or "")
        return WrongResultError(of_exception(error, tool=False, file=getattr(module, "__file__", None)).error)


@dataclass(frozen=True, slots=True)
class AgentAt:
    """Where an agent's function is. What `load` gives makes agents of it."""

    located: Located

    def load(self) -> Callable[..., Agent]:
        """Import it. Raises UserError, as `find_function` does."""
        return partial(FunctionAgent, self.located.load())


def told(value: Any) -> str:
    """What an agent returned, as JSON: `{"reward": number or null, "metrics": {name: number}}`.

    A number is the reward, None that it has none; a mapping has it under `reward`, and metrics beside it. Raises
    WrongResultError for everything else, and for numbers that are not finite.
    """
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        raise WrongResultError("it yields: return the reward, and do not yield")
    if not isinstance(value, Mapping):
        return _written(number_of(value, "the reward that it returned"), {})
    if "reward" not in value:
        has = ", ".join(map(str, value)) or "nothing"
        raise WrongResultError(f"it returned a dict without 'reward'; it has {has}")
    metrics = {}
    for name, one in value.items():
        if not isinstance(name, str) or not name:
            raise WrongResultError(f"it returned a metric called {shortened(name)}: names are texts")
        if name != "reward" and (number := number_of(one, f"the metric {name!r}")) is not None:
            metrics[name] = number
    return _written(number_of(value["reward"], "the reward"), metrics)


def _written(reward: float | None, metrics: Mapping[str, float]) -> str:
    return json.dumps({"reward": reward, "metrics": metrics})


def _taken(function: Callable[..., Any]) -> set[str] | None:
    """The names of the parameters that can be given by keyword; None if it takes any, or does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
