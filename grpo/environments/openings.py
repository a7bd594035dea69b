"""The prompt of a conversation: the dataset's prompt, and the text that the environment's `reset` adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo.backend.random import derive_seed
from grpo.environments.seats import Content
from grpo.types import Message, Prompt, Task


def messages_of(prompt: Prompt, system: str | None = None) -> list[Message]:
    """Return a dataset's prompt as messages. `system` precedes a text prompt; prompts of messages already have it."""
    if not isinstance(prompt, str):
        return list(prompt)
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def with_added(messages: Sequence[Message], added: Content) -> tuple[Message, ...]:
    """Return the messages with `added` at the end of the last message: text joins text, and blocks follow blocks."""
    *before, last = messages
    content = last["content"]
    if isinstance(added, str) and isinstance(content, str):
        return (*before, {**last, "content": content + added})
    return (*before, {**last, "content": [*_blocks(content), *_blocks(added)]})


def _blocks(content: Content) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def begun_with(task: Task) -> dict[str, Any]:
    """Return the columns with which `reset` is called."""
    return {"prompt": task.prompt, **task.columns}


def seed_of(seed: int, task: Task, sample: int) -> int:
    """Return an environment's seed, derived from the run's seed. It depends only on the dataset row and the sample."""
    return derive_seed(seed, f"environment:{task.source}", task.index, sample)
