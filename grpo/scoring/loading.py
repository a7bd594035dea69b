"""Loads a reward function in the process that runs it. Worker processes import this module."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from grpo.plugins import Function, Located
from grpo.scoring.contract import Reward, calls_of, is_paid
from grpo.scoring.forms import Form


def load(
    located: Located,
    kwargs: Mapping[str, Any],
    form: Form | None = None,
    system: str | None = None,
    run: Callable[[Coroutine[Any, Any, Any]], Any] | None = None,
    function: Function | None = None,
) -> tuple[Reward, dict[str, Any]]:
    """The reward, and the settings of its file (`calls` and `paid`). See `Reward` for the arguments; `function` is a
    function that was passed as an object.

    Raises UserError if the function cannot be imported, and ValueError if its arguments do not fit.
    """
    function = function or located.load()
    return Reward(function, kwargs, form, system, run), {"calls": calls_of(function), "paid": is_paid(function)}
