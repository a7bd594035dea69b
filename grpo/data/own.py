"""A class of the user's own among the sources of tasks: what it raises, and what it keeps, are told in their words."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpo.data.source import Source
from grpo.errors import RunError, UserError
from grpo.types import Group, Task

R = TypeVar("R")


class OwnSource:
    """The source that a class of `data.sampler` made, called `name` in errors.

    Every method raises RunError where the user's own raises an exception: a line with the method, the exception, and
    the place in their file.
    """

    def __init__(self, source: Source, name: str) -> None:
        self._source, self._name = source, name

    def take(self, n: int) -> list[Task]:
        return self._call(f"take({n})", lambda: self._source.take(n))

    def observe(self, groups: Sequence[Group]) -> None:
        self._call("observe()", lambda: self._source.observe(groups))

    def metrics(self) -> dict[str, float]:
        return self._call("metrics()", self._source.metrics)

    def state(self) -> Mapping[str, Any]:
        """Its state. Raises RunError for one that a checkpoint cannot hold, which is JSON."""
        state = self._call("state()", self._source.state)
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise RunError(
                f"{self._name}: what state() returns goes into checkpoints as JSON, and {error}. Return dicts, lists, "
                "texts, numbers, true, false and None: of tasks their `index`, of a set a sorted list"
            ) from error
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._call("load_state()", lambda: self._source.load_state(state))

    def _call(self, what: str, call: Callable[[], R]) -> R:
        try:
            return call()
        except (UserError, RunError):
            raise
        except Exception as error:  # the user's code: whatever it raises is theirs to see
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raised = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(
                f"{self._name}: {what} raised {raised} ({Path(frame.filename).name}, line {frame.lineno}, in "
                f"{frame.name})"
            ) from error
