"""Rewards that take `environments`, called in the process where the environments live."""

from __future__ import annotations

import asyncio
import importlib
import pickle
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from grpo.errors import UserError

DOOR = "grpo.scoring.loading"
"""The module whose `load` wraps a function as a reward. It is imported by name, because its room imports this room."""
PARAMETER = "environments"
GONE = "its environment is lost, so it could not be passed to the reward"


class HostedRewards:
    """The rewards of one process, by name. Not thread-safe."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._rewards: dict[str, Any] = {}
        self._loop = loop

    def handle(self, request: Mapping[str, Any], environments: Sequence[Any]) -> Any:
        """Run the operation `load`, `reward_problem`, or `score`.

        Raises ValueError or UserError for a reward that cannot be loaded.
        """
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
        """Run an asynchronous reward on the environments' loop, because their clients are bound to that loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _scored(
    reward: Any, environments: Sequence[Any], columns: Mapping[str, Sequence[Any]], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Call a reward and return its answer. Failures are the seats that are lost, and the failures of the reward."""
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
    """Return the answer of a call that failed for all of its `count` completions."""
    failures = dict.fromkeys(range(count), error)
    told = {"seconds": seconds, "kind": kind, "fatal": fatal}
    return {"values": [None] * count, "failures": failures, "extras": {}, "metrics": {}, **told}


def _spread(column: Sequence[Any], there: Sequence[int], count: int) -> list[Any]:
    values = dict(zip(there, column, strict=True))
    return [values.get(place) for place in range(count)]
