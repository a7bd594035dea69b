"""The protocol of task sources: a shuffled stream of rows, a curriculum, or any other way to choose tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from grpo.errors import UserError
from grpo.types import Group, Task


class Source(Protocol):
    """Gives tasks to a trainer, and receives their results.

    `grpo.data.stream.TaskStream` is the source for a recipe's `data` section. A curriculum, a mixture of datasets or a
    replay of hard tasks is another class with these methods; it need not inherit from this class. With several
    processes, each has its own source, and all must give the same tasks: draw from the seed, never from the clock.
    """

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks. A task's `identity`, (source, index), is the same each time that it is given.

        Raises UserError if there are no more tasks.
        """
        ...

    def observe(self, groups: Sequence[Group]) -> None:
        """Called once per step with every sampled and scored group, including groups that `rollout.dynamic_sampling`
        drops. Rewards are set; advantages and penalties are not set yet."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics about the tasks so far, by their names in a step's metrics."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Everything that has changed since the source was created, as JSON, for a checkpoint.

        The trainer holds the result during the next step, which may fail, so later calls must not change it.
        """
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from the `state` of a source with the same settings."""
        ...


METHODS = ("take", "observe", "metrics", "state", "load_state")


def checked_source(source: Source) -> Source:
    """Return the source. Raises UserError with the names of the `Source` methods that it lacks."""
    lacking = [name for name in METHODS if not callable(getattr(source, name, None))]
    if lacking:
        name, methods = type(source).__name__, ", ".join(f"{name}()" for name in lacking)
        raise UserError(
            f"source {name}: it has no {methods}. A source needs {', '.join(METHODS)}. `state` and `load_state` are "
            "for checkpoints: a source without a state returns {} and ignores the argument"
        )
    return source


def taken(source: Source, n: int) -> list[Task]:
    """The source's next `n` tasks. Raises UserError if it does not return `n` tasks."""
    tasks: Any = source.take(n)
    name, wanted = type(source).__name__, f"take({n}) must return a list of {n} tasks (grpo.types.Task)"
    if not isinstance(tasks, list | tuple):
        raise UserError(f"source {name}: {wanted}, but it returned {type(tasks).__name__}")
    if odd := [task for task in tasks if not isinstance(task, Task)]:
        raise UserError(
            f"source {name}: {wanted}, but the list contains {type(odd[0]).__name__}: a stream gives None for a row "
            "whose prompt is null or too long"
        )
    if len(tasks) != n:
        raise UserError(f"source {name}: {wanted}, but it returned {len(tasks)}: start over when the tasks are used up")
    return [*tasks]
