"""Wraps a user's class as a task source, with errors that name the user's method, file and line."""

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
    """The source that a `data.sampler` class created, named `name` in errors.

    If a method of the user's class raises an exception, the wrapper raises RunError: one line with the method, the
    exception, and the place in the user's file.
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
        """The source's state. Raises RunError if the state is not JSON, which checkpoints need."""
        state = self._call("state()", self._source.state)
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise RunError(
                f"{self._name}: checkpoints store the result of state() as JSON, but {error}. Return dicts, lists, "
                "strings, numbers, True, False and None: the `index` of a task, a sorted list instead of a set"
            ) from error
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._call("load_state()", lambda: self._source.load_state(state))

    def _call(self, what: str, call: Callable[[], R]) -> R:
        try:
            return call()
        except (UserError, RunError):
            raise
        except Exception as error:  # the user's code may raise anything, and the user must see it
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raised = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(
                f"{self._name}: {what} raised {raised} ({Path(frame.filename).name}, line {frame.lineno}, in "
                f"{frame.name})"
            ) from error
