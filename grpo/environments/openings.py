"""The prompt of a conversation: the dataset's, and what the environment's `reset` adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo.backend.random import derive_seed
from grpo.environments.seats import Content
from grpo.types import Message, Prompt, Task


def messages_of(prompt: Prompt, system: str | None = None) -> list[Message]:
    """A dataset's prompt as messages. `system` comes before text; messages have it already."""
    if not isinstance(prompt, str):
        return list(prompt)
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def with_added(messages: Sequence[Message], added: Content) -> tuple[Message, ...]:
    """The messages with more behind the last one's content: text directly, and blocks after its blocks."""
    *before, last = messages
    content = last["content"]
    if isinstance(added, str) and isinstance(content, str):
        return (*before, {**last, "content": content + added})
    return (*before, {**last, "content": [*_blocks(content), *_blocks(added)]})


def _blocks(content: Content) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def begun_with(task: Task) -> dict[str, Any]:
    """The columns that `reset` is called with."""
    return {"prompt": task.prompt, **task.columns}


def seed_of(seed: int, task: Task, sample: int) -> int:
    """The seed of an environment, by the run's: the same whenever this sample of this row is played."""
    return derive_seed(seed, f"environment:{task.source}", task.index, sample)
