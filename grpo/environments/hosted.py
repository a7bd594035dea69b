"""Rewards that take `environments`, called where these live."""

from __future__ import annotations

import asyncio
import importlib
import pickle
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from grpo.errors import UserError

DOOR = "grpo.scoring.loading"
"""The module whose `load` makes a reward of a function. It is in a room below this one, which hands itself in."""
PARAMETER = "environments"
GONE = "its environment is lost, so it could not be shown to the reward"


class HostedRewards:
    """The rewards of one process by name. Not for several threads at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._rewards: dict[str, Any] = {}
        self._loop = loop

    def handle(self, request: Mapping[str, Any], environments: Sequence[Any]) -> Any:
        """Do `load`, `reward_problem` or `score`. Raises ValueError and UserError for rewards that cannot be had."""
        if request["op"] == "load":
            reward = request["reward"]
            load = importlib.import_module(DOOR).load
            made, told = load(reward.located, reward.kwargs, reward.form, reward.system, self._run, reward.function)
            self._rewards[reward.located.name] = made
            return told
        if request["name"] not in self._rewards:
            raise UserError(f"reward {request['name']!r} could not be loaded into this process")
        reward = self._rewards[request["name"]]
        if request["op"] == "reward_problem":
            return reward.problem([*request["columns"], PARAMETER])
        columns = pickle.loads(request["columns"])
        return _scored(reward, environments, columns, request["state"])

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """An asynchronous reward runs on the loop of the environments, whose clients belong to it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _scored(
    reward: Any, environments: Sequence[Any], columns: Mapping[str, Sequence[Any]], state: Mapping[str, Any]
) -> dict[str, Any]:
    """One call's answer, whose failures are those of seats that are lost, and those that the reward had."""
    there = [place for place, environment in enumerate(environments) if environment is not None]
    if not there:
        return failed(len(environments), GONE)
    given = {name: [values[place] for place in there] for name, values in columns.items()}
    answer = reward({**given, PARAMETER: [environments[place] for place in there]}, state)
    values: list[float | None] = [None] * len(environments)
    failures = {place: GONE for place, environment in enumerate(environments) if environment is None}
    for place, value in zip(there, answer.values, strict=True):
        values[place] = value
    failures |= {there[place]: error for place, error in answer.failures.items()}
    extras = {name: _spread(column, there, len(environments)) for name, column in answer.extras.items()}
    told = {name: getattr(answer, name) for name in ("metrics", "seconds", "kind", "fatal")}
    return {"values": values, "failures": failures, "extras": extras, **told}


def failed(count: int, error: str, kind: str = "error", seconds: float = 0.0, fatal: bool = False) -> dict[str, Any]:
    """The answer of a call that failed for all of its completions."""
    failures = dict.fromkeys(range(count), error)
    told = {"seconds": seconds, "kind": kind, "fatal": fatal}
    return {"values": [None] * count, "failures": failures, "extras": {}, "metrics": {}, **told}


def _spread(column: Sequence[Any], there: Sequence[int], count: int) -> list[Any]:
    values = dict(zip(there, column, strict=True))
    return [values.get(place) for place in range(count)]
