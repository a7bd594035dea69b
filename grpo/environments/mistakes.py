"""Errors for mistakes of an environment's author, with advice on how to fix them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from grpo.types import Trajectory

WAY_OUT = (
    "an environment can only await what its sampler provides: run code that needs asyncio, or takes time, in a thread, "
    "and wait for it with `await sampler.outside(executor.submit(...))`"
)


class EnvironmentMistake(ValueError):
    """An environment used its sampler incorrectly. The rollout adds the environment's name and the row."""


def token_ids_of(given: Any) -> list[int]:
    """Return the tokens that an environment appends as a list of ids. Raises EnvironmentMistake for text."""
    how = "`extend` takes token ids: sampler.tokenizer.encode(text, add_special_tokens=False)"
    if isinstance(given, str | bytes):
        raise EnvironmentMistake(f"it extends a row with the text {given!r:.60}, but {how}")
    try:
        if any(isinstance(token, str | bytes) for token in given):
            raise TypeError
        return [int(token) for token in given]
    except (TypeError, ValueError) as error:
        raise EnvironmentMistake(f"it extends a row with {given!r:.60}, but {how}") from error


def check_awaitable(started: object) -> None:
    """Raise EnvironmentMistake unless the return value of `rollout` can be awaited."""
    if not inspect.isawaitable(started):
        raise EnvironmentMistake(
            f"`rollout` returned {_a(started)}, which cannot be awaited: write `async def rollout(self, task, sampler)`"
            ", and return a list"
        )


def check_trajectories(made: Any, n: int) -> Sequence[Trajectory]:
    """Return the result of `rollout`. Raises EnvironmentMistake if it is not `n` trajectories."""
    how = "it must return a list of trajectories, such as sampler.ended(row) and sampler.extend(row, token_ids) return"
    if not isinstance(made, Sequence) or isinstance(made, str):
        raise EnvironmentMistake(f"`rollout` returned {_a(made)}: {how}")
    wrong = [one for one in made if not isinstance(one, Trajectory)]
    if wrong:
        raise EnvironmentMistake(f"`rollout` returned {_a(wrong[0])} among its trajectories: {how}")
    if len(made) != n:
        raise EnvironmentMistake(f"it returned {len(made)} trajectories, but a group has {n} (sampler.n)")
    return made


def mistake_of(error: Exception) -> EnvironmentMistake | None:
    """Return the author's mistake that caused an error; None if the error has another cause."""
    if isinstance(error, EnvironmentMistake):
        return error
    if isinstance(error, RuntimeError) and str(error) == "no running event loop":  # the code called asyncio
        return EnvironmentMistake(f"{WAY_OUT} ({error})")
    return None


def _a(thing: object) -> str:
    if thing is None:
        return "None"
    name = type(thing).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
