"""What an environment's author may get wrong, said so that it can be mended."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from grpo.types import Trajectory

WAY_OUT = (
    "an environment can await what its sampler gives it alone: what needs asyncio, or time, belongs into a thread, "
    "whose result `await sampler.outside(executor.submit(...))` waits for"
)


class EnvironmentMistake(ValueError):
    """An environment asked for something that it cannot have. The rollout adds the environment's name and the row."""


def token_ids_of(given: Any) -> list[int]:
    """What an environment wants to append, as token ids. Raises EnvironmentMistake for text."""
    how = "`extend` takes token ids: sampler.tokenizer.encode(text, add_special_tokens=False)"
    if isinstance(given, str | bytes):
        raise EnvironmentMistake(f"it extends a row with the text {given!r:.60}, and {how}")
    try:
        if any(isinstance(token, str | bytes) for token in given):
            raise TypeError
        return [int(token) for token in given]
    except (TypeError, ValueError) as error:
        raise EnvironmentMistake(f"it extends a row with {given!r:.60}, and {how}") from error


def check_awaitable(started: object) -> None:
    """Raises EnvironmentMistake for what `rollout` returned where that is nothing to await."""
    if not inspect.isawaitable(started):
        raise EnvironmentMistake(
            f"`rollout` returned {_a(started)} and nothing to await: write `async def rollout(self, task, sampler)`, "
            "and let it return a list"
        )


def check_trajectories(made: Any, n: int) -> Sequence[Trajectory]:
    """What `rollout` made. Raises EnvironmentMistake if it is not `n` trajectories."""
    how = "it must return a list of trajectories, as sampler.ended(row) and sampler.extend(row, token_ids) give"
    if not isinstance(made, Sequence) or isinstance(made, str):
        raise EnvironmentMistake(f"`rollout` returned {_a(made)}: {how}")
    wrong = [one for one in made if not isinstance(one, Trajectory)]
    if wrong:
        raise EnvironmentMistake(f"`rollout` returned {_a(wrong[0])} among its trajectories: {how}")
    if len(made) != n:
        raise EnvironmentMistake(f"it made {len(made)} trajectories, and a group has {n} (sampler.n)")
    return made


def mistake_of(error: Exception) -> EnvironmentMistake | None:
    """The author's mistake that an error comes from; None if it is another's."""
    if isinstance(error, EnvironmentMistake):
        return error
    if isinstance(error, RuntimeError) and str(error) == "no running event loop":  # asyncio says so, where it has none
        return EnvironmentMistake(f"{WAY_OUT} ({error})")
    return None


def _a(thing: object) -> str:
    if thing is None:
        return "None"
    name = type(thing).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
