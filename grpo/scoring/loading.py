"""A reward function made ready where it runs. Worker processes import this."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from grpo.plugins import Located
from grpo.scoring.arguments import takes_environments
from grpo.scoring.contract import Reward, calls_of, is_paid
from grpo.scoring.forms import Form


def load(
    located: Located,
    kwargs: Mapping[str, Any],
    form: Form | None = None,
    system: str | None = None,
    run: Callable[[Coroutine[Any, Any, Any]], Any] | None = None,
) -> tuple[Reward, dict[str, Any]]:
    """The reward, and what is known of it (`calls`, `paid`, `environments`: it takes these). See `Reward` for the arguments.

    Raises UserError if it cannot be imported, and ValueError if its arguments do not fit.
    """
    function = located.load()
    reward = Reward(function, kwargs, form, system, run)
    takes = takes_environments(reward.function)
    return reward, {"calls": calls_of(function), "paid": is_paid(function), "environments": takes}
