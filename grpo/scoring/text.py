"""Converts completions of either form to text, and formats counts for messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo.data.messages import text_of
from grpo.types import Prompt, Trajectory

SHORT = 100
"""Maximum number of characters of a completion in an error message."""


def texts(completions: Iterable[Any]) -> list[str]:
    """Each completion as a text; lists of messages are converted by `said`."""
    return [said(completion) for completion in completions]


def said(completion: Any) -> str:
    """A text unchanged; for messages, the assistant's turns joined by line breaks.

    Results of tools and environments are left out, so that a right answer in a tool's result does not count as the
    model's answer. Tool calls are left out too. Messages without an assistant's turn give the text of the last message.
    """
    if isinstance(completion, str):
        return completion
    spoken = [text_of(message) for message in completion if message.get("role") == "assistant"]
    return "\n".join(filter(None, spoken)) if spoken else as_text(completion)


def said_in(trajectory: Trajectory) -> str:
    """The model's own text: the completion, or the assistant's turns of a conversation (`said`)."""
    return trajectory.text if trajectory.conversation is None else said(trajectory.conversation.messages)


def last_said(prompt: Prompt, trajectory: Trajectory) -> str:
    """A phrase that identifies a completion in a message: its last non-empty text, or else its prompt."""
    talk = trajectory.conversation
    spoken = [trajectory.text] if talk is None else [text_of(message) for message in talk.messages]
    if there := [text for text in spoken if text.strip()]:
        return f"after {short(there[-1])!r}"
    return f"with the prompt {short(as_text(prompt))!r}"


def short(text: str) -> str:
    """A text on one line, truncated to `SHORT` characters."""
    line = " ".join(text.split())
    return line if len(line) <= SHORT else f"{line[: SHORT - 1]}…"


def as_text(value: Any) -> str:
    """A text unchanged; for a list of messages, the text of the last message."""
    return value if isinstance(value, str) else text_of(value[-1])


def counted(count: int, noun: str = "completion") -> str:
    """A count with its noun: `1 completion`, `2,000 completions`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
