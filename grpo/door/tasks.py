"""`grpo.tasks`: prompts from data, in lists of n, without end."""

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
"""What a recipe calls rows that were given as an object."""
OF_THE_MODEL = {"chat_template", "chat_template_kwargs", "max_prompt_length"}
"""Settings of `data` that only matter where there is a tokenizer."""


def tasks(data: Any, *, prompt: str = "prompt", n: int = 8, seed: int = 0, **settings: Any) -> TaskLists:
    """Prompts from `data`, as an endless iterator of lists of `n` tasks.

    `data` is a `datasets.Dataset`, a list of dicts, a pandas DataFrame or any other iterable of dicts; or, as text, a
    Hub dataset, a file (.jsonl, .json, .csv, .parquet), a pattern of file names, or a built-in task such as
    `builtin:arithmetic`. `prompt` is a template over its columns, `"{question} Think first."`, or the name of a column
    of text or of chat messages. Each epoch visits every row once, in an order drawn from `seed` and the epoch. Rows
    with a null prompt are left out. `settings` are the recipe's for data: `split` ("train"), `config`, `revision`,
    `columns`, `system`, `shuffle` (True) and `continue_final_message`. With `system` prompts are messages.

    A task has a `prompt`, `columns` (its row, which rewards receive by name) and `identity`, (source, index). Its
    token ids are made by the policy that samples it.

    Raises UserError for data that cannot be had, that has no rows, or whose columns do not fit the prompt.

    >>> tasks = grpo.tasks([{"question": "What is 2+2?", "answer": "4"}], prompt="{question}", n=2)
    >>> [task.prompt for task in next(tasks)]
    ['What is 2+2?', 'What is 2+2?']
    """
    if wrong := OF_THE_MODEL & set(settings):
        name = min(wrong)
        how = (
            "leave out long prompts by len(policy.encode(task.prompt))" if "length" in name else "give it to grpo.load"
        )
        raise UserError(f"{SAID_BY}: {name} needs a tokenizer, which tasks have not: {how}")
    if wrong := {"curriculum", "sampler"} & set(settings):
        raise UserError(f"{SAID_BY}: {min(wrong)} learns from scores, which only a run has: it is for grpo.Trainer")
    n = whole_number(n, f"{SAID_BY}: n")
    if n < 1:
        raise UserError(f"{SAID_BY}: n is {n}; a list has 1 task or more")
    cfg, given = described(data)
    cfg = with_settings(cfg, {"prompt": prompt, **settings}, SAID_BY)
    reader = _WithSystem(cfg, "data" if cfg.source is None else cfg.label)
    rows = given.rows("data", cfg)
    stream = WindowStream(rows, reader, seed) if isinstance(rows, Streamed) else TaskStream(rows, reader, seed)
    return TaskLists(stream, n)


def described(data: Any) -> tuple[DataConfig, Given]:
    """How a recipe names data, and the data itself where it is an object that a recipe can only name."""
    if is_source(data):
        try:
            return with_settings(DataConfig(source="rows"), {"source": source_of(data)}, SAID_BY), Given()
        except UserError as error:
            hint = "" if isinstance(data, str | Path) else '. Prompts of your own are rows: [{"prompt": "..."}]'
            raise UserError(f"{error}{hint}") from None
    return DataConfig(use=OBJECT), Given(data={"data": data})


def is_source(data: Any) -> bool:
    """Whether data is named by text, as in a recipe, or by several names of files."""
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(name, str | Path) for name in data)
    return isinstance(data, str | Path)


def source_of(data: Any) -> Origin:
    """Data that is named, as a recipe's `data.source` names it."""
    return str(data) if isinstance(data, str | Path) else tuple(map(str, data))


class TaskLists(Iterator[list[Task]]):
    """Lists of tasks without end. `state` and `load_state` make it go on where another one was."""

    def __init__(self, stream: TaskStream | WindowStream, n: int) -> None:
        self._stream, self.n = stream, n

    def __next__(self) -> list[Task]:
        return self._stream.take(self.n)

    def state(self) -> dict[str, Any]:
        """Where it is, as JSON holds it: the rows visited so far, and those of them that were left out."""
        return self._stream.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where an iterator over the same data, with the same seed, gave this state."""
        self._stream.load_state(state)


class _WithSystem(PromptReader):
    """Puts the system message before text, too: the policy, which encodes the prompt, does not know it."""

    def task(self, index: int, row: Mapping[str, Any]) -> Task | None:
        task = super().task(index, row)
        if task is None or self.cfg.system is None or not isinstance(task.prompt, str):
            return task
        messages = with_system([{"role": "user", "content": task.prompt}], self.cfg.system, f"row {index}")
        return Task(index, messages, (), row, task.source)
