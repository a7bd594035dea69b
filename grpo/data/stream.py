"""A stream of tasks, reshuffled every epoch or in the rows' stored order. Its position is a single number."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from grpo.backend.random import derive_seed
from grpo.data.prompts import PromptReader
from grpo.data.rows import Rows
from grpo.errors import UserError
from grpo.types import Group, Task

PROMPTS = (
    "prompt",
    "system",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "max_prompt_length",
)
"""The settings of `data` that determine a row's prompt, and whether it fits."""


class TaskStream:
    """The `Source` for a recipe's `data` section: an endless sequence of tasks from rows. Each epoch visits every row
    once, in an order drawn from the seed and the epoch, or in the stored order if `data.shuffle` is false.

    `cursor` counts the visited rows over all epochs: a stream with the same rows and seed that loads this state
    continues from there. `dropped` counts visited rows whose prompts were too long or null.
    """

    def __init__(self, rows: Rows, renderer: PromptReader, seed: int) -> None:
        self._rows = rows
        self._renderer = renderer
        self._seed = seed
        self.cursor = 0
        self.dropped = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks. Raises UserError if every prompt of the dataset is too long or null."""
        tasks: list[Task] = []
        misses = 0
        while len(tasks) < n:
            task = self.kept(self._next())
            if task is not None:
                tasks.append(task)
                misses = 0
                continue
            self.dropped += 1
            misses += 1
            if misses > 2 * len(self._rows):  # covers a whole epoch, wherever the misses began
                raise self.nothing_fits()
        return tasks

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    @property
    def source(self) -> str:
        """The source name in this stream's tasks."""
        return self._renderer.source

    @property
    def rows(self) -> Rows:
        """The rows of the dataset."""
        return self._rows

    @property
    def settings(self) -> dict[str, Any]:
        """The values of the `data` settings in `PROMPTS`."""
        return self._renderer.cfg.model_dump(mode="json", include={*PROMPTS})

    def task(self, index: int) -> Task | None:
        """The task of a row, without moving the cursor; None for a row whose prompt is null."""
        return self._renderer.task(index, self._rows[index])

    def kept(self, index: int) -> Task | None:
        """The task of a row; None for a row whose prompt is null or too long."""
        task = self.task(index)
        return task if task is not None and self._renderer.fits(task) else None

    def nothing_fits(self) -> UserError:
        """The error for a dataset without a prompt that fits."""
        return all_too_long(self._renderer)

    def observe(self, groups: Sequence[Group]) -> None:
        """No-op: the order of the rows does not depend on their results."""

    def metrics(self) -> dict[str, float]:
        return {"dropped_prompts": float(self.dropped), "epoch": self.cursor / len(self._rows)}

    def state(self) -> dict[str, int]:
        """The position of the stream, for `load_state`."""
        return {"cursor": self.cursor, "dropped": self.dropped}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a stream with the same rows and seed. Starts at the first row after another kind of
        source."""
        self.cursor, self.dropped = state.get("cursor", 0), state.get("dropped", 0)

    def _next(self) -> int:
        """The index of the next row."""
        epoch, position = divmod(self.cursor, len(self._rows))
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        self.cursor += 1
        return self._order[1][position]

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._rows)))
        if self._renderer.cfg.shuffle:
            random.Random(derive_seed(self._seed, "shuffle", epoch)).shuffle(order)
        return order


def first_tasks(rows: Rows, renderer: PromptReader, n: int) -> list[Task]:
    """The first `n` tasks in the rows' stored order, without prompts that are too long or null, for evaluation."""
    rendered = (renderer.task(index, rows[index]) for index in range(len(rows)))
    tasks = list(islice((task for task in rendered if task is not None and renderer.fits(task)), n))
    if not tasks:
        raise all_too_long(renderer)
    return tasks


def all_too_long(renderer: PromptReader) -> UserError:
    """The error for a dataset without a prompt that fits."""
    limit = renderer.cfg.max_prompt_length
    return UserError(
        f"data {renderer.cfg.label}: every prompt is null or longer than max_prompt_length ({limit} tokens)"
    )
