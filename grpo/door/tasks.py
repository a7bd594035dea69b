"""`grpo.tasks`: an endless iterator of lists of prompts from data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo.config import DataConfig
from grpo.config.data import Origin
from grpo.data.messages import with_system
from grpo.data.prompts import PromptReader
from grpo.data.stream import TaskStream
from grpo.data.streaming import Streamed, WindowStream
from grpo.door.checks import whole_number
from grpo.errors import UserError
from grpo.plugins import SESSION
from grpo.recipes import with_settings
from grpo.runs.given import Given
from grpo.types import Task

SAID_BY = "grpo.tasks"
OBJECT = f"{SESSION}:data"
"""The name in a recipe for rows that were passed as an object."""
OF_THE_MODEL = {"chat_template", "chat_template_kwargs", "max_prompt_length"}
"""Settings of `data` that need a tokenizer."""


def tasks(data: Any, *, prompt: str = "prompt", n: int = 8, seed: int = 0, **settings: Any) -> TaskLists:
    """Return an endless iterator of lists of `n` tasks with prompts from `data`.

    `data` is a `datasets.Dataset`, a list of dicts, a pandas DataFrame or any other iterable of dicts; or, as text, a
    Hub dataset, a file (.jsonl, .json, .csv, .parquet), a pattern of file names, or a built-in task such as
    `builtin:arithmetic`. `prompt` is a template over its columns, `"{question} Think first."`, or the name of a column
    of text or of chat messages. Each epoch visits every row once, in an order drawn from `seed` and the epoch. Rows
    with a null prompt are skipped. `settings` are the recipe's settings for data: `split` ("train"), `config`,
    `revision`, `columns`, `system`, `shuffle` (True) and `continue_final_message`. With `system`, prompts are messages.

    A task has a `prompt`, `columns` (its row, which rewards receive by name) and `identity`, (source, index). The
    policy that samples the task computes its token ids.

    Raises UserError for data that cannot be loaded, that has no rows, or whose columns do not fit the prompt.

    >>> tasks = grpo.tasks([{"question": "What is 2+2?", "answer": "4"}], prompt="{question}", n=2)
    >>> [task.prompt for task in next(tasks)]
    ['What is 2+2?', 'What is 2+2?']
    """
    if wrong := OF_THE_MODEL & set(settings):
        name = min(wrong)
        how = "drop long prompts by len(policy.encode(task.prompt))" if "length" in name else "pass it to grpo.load"
        raise UserError(f"{SAID_BY}: {name} needs a tokenizer, but tasks have none: {how}")
    if wrong := {"curriculum", "sampler"} & set(settings):
        raise UserError(f"{SAID_BY}: {min(wrong)} learns from scores, which only a run has: use grpo.Trainer")
    n = whole_number(n, f"{SAID_BY}: n")
    if n < 1:
        raise UserError(f"{SAID_BY}: n is {n}, but must be at least 1")
    cfg, given = described(data)
    cfg = with_settings(cfg, {"prompt": prompt, **settings}, SAID_BY)
    reader = _WithSystem(cfg, "data" if cfg.source is None else cfg.label)
    rows = given.rows("data", cfg)
    stream = WindowStream(rows, reader, seed) if isinstance(rows, Streamed) else TaskStream(rows, reader, seed)
    return TaskLists(stream, n)


def described(data: Any) -> tuple[DataConfig, Given]:
    """Return the recipe's section for data, and the data itself if it is an object that the section only names."""
    if is_source(data):
        try:
            return with_settings(DataConfig(source="rows"), {"source": source_of(data)}, SAID_BY), Given()
        except UserError as error:
            hint = "" if isinstance(data, str | Path) else '. Pass prompts as rows: [{"prompt": "..."}]'
            raise UserError(f"{error}{hint}") from None
    return DataConfig(use=OBJECT), Given(data={"data": data})


def is_source(data: Any) -> bool:
    """Whether data is a name, as in a recipe, or a list of file names."""
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(name, str | Path) for name in data)
    return isinstance(data, str | Path)


def source_of(data: Any) -> Origin:
    """Return named data in the form of a recipe's `data.source`."""
    return str(data) if isinstance(data, str | Path) else tuple(map(str, data))


class TaskLists(Iterator[list[Task]]):
    """An endless iterator of lists of tasks. `state` and `load_state` resume an earlier iterator."""

    def __init__(self, stream: TaskStream | WindowStream, n: int) -> None:
        self._stream, self.n = stream, n

    def __next__(self) -> list[Task]:
        return self._stream.take(self.n)

    def state(self) -> dict[str, Any]:
        """Return the position as JSON-compatible data: the rows visited so far, and the skipped rows among them."""
        return self._stream.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of an iterator over the same data with the same seed."""
        self._stream.load_state(state)


class _WithSystem(PromptReader):
    """Adds the system message to text prompts as well, because the policy that encodes the prompt does not know it."""

    def task(self, index: int, row: Mapping[str, Any]) -> Task | None:
        task = super().task(index, row)
        if task is None or self.cfg.system is None or not isinstance(task.prompt, str):
            return task
        messages = with_system([{"role": "user", "content": task.prompt}], self.cfg.system, f"row {index}")
        return Task(index, messages, (), row, task.source)
