"""Where a run's tasks come from: one protocol for a shuffled stream of rows, and for whatever else chooses tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from grpo.errors import UserError
from grpo.types import Group, Task


class Source(Protocol):
    """Gives a trainer its tasks, and learns what became of them.

    `grpo.data.stream.TaskStream` is the one that a recipe's `data` section makes. A curriculum, a mixture of data sets
    or a replay of hard tasks is another class with these methods; it need not inherit from this one. With several
    processes each has a source of its own, and all must give the same tasks: draw from the seed, never from the clock.
    """

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks. A task's `identity`, (source, index), stays the same each time that it is given.

        Raises UserError where there are no such tasks.
        """
        ...

    def observe(self, groups: Sequence[Group]) -> None:
        """Called once a step with every group that was sampled, scored and with its reward: also with those that
        `rollout.dynamic_sampling` does not learn from. Advantages and penalties are not set yet."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to tell of the tasks so far, by the name that a step's metrics give it."""
        ...

    def state(self) -> Mapping[str, Any]:
        """All that has changed since the source was made, as JSON holds it: what a checkpoint keeps.

        It is kept while the next step is made, which may fail: later calls must not change what was returned here.
        """
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a source with the same settings was when it gave this `state`."""
        ...


METHODS = ("take", "observe", "metrics", "state", "load_state")


def checked_source(source: Source) -> Source:
    """The same source. Raises UserError that names the methods of a `Source` which it lacks."""
    lacking = [name for name in METHODS if not callable(getattr(source, name, None))]
    if lacking:
        name, methods = type(source).__name__, ", ".join(f"{name}()" for name in lacking)
        raise UserError(
            f"source {name}: it has no {methods}. A source has {', '.join(METHODS)}: `state` and `load_state` are what "
            "checkpoints keep of it; one that has nothing to keep returns {} and ignores what it is given"
        )
    return source


def taken(source: Source, n: int) -> list[Task]:
    """The source's next `n` tasks. Raises UserError where what it gives are not so many tasks."""
    tasks: Any = source.take(n)
    name, wanted = type(source).__name__, f"take({n}) has to return a list of {n} tasks (grpo.types.Task)"
    if not isinstance(tasks, list | tuple):
        raise UserError(f"source {name}: {wanted}, and it returned {type(tasks).__name__}")
    if odd := [task for task in tasks if not isinstance(task, Task)]:
        raise UserError(
            f"source {name}: {wanted}, and there is {type(odd[0]).__name__} among them: a stream gives None for a row "
            "whose prompt is null or too long"
        )
    if len(tasks) != n:
        raise UserError(
            f"source {name}: {wanted}, and it returned {len(tasks)}: begin anew where the tasks are used up"
        )
    return [*tasks]
