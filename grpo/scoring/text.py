"""Completions as texts, whatever form they have, and numbers of them in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo.data.messages import text_of
from grpo.types import Prompt, Trajectory

SHORT = 100
"""Characters of a completion that a line of an error shows."""


def texts(completions: Iterable[Any]) -> list[str]:
    """Each completion as a text: it is one, or a list of messages, of which `said` makes one."""
    return [said(completion) for completion in completions]


def said(completion: Any) -> str:
    """A text as it is; of messages what the assistant said in them, a line break between its turns.

    What tools and environments answered is left out, so that a right answer in a tool's result is not the model's, and
    so are the calls of tools. Of messages without an assistant's the last counts.
    """
    if isinstance(completion, str):
        return completion
    spoken = [text_of(message) for message in completion if message.get("role") == "assistant"]
    return "\n".join(filter(None, spoken)) if spoken else as_text(completion)


def said_in(trajectory: Trajectory) -> str:
    """What the model itself said: the text, or of a conversation what `said` makes of it."""
    return trajectory.text if trajectory.conversation is None else said(trajectory.conversation.messages)


def last_said(prompt: Prompt, trajectory: Trajectory) -> str:
    """How a completion is told from others in a line: the last thing that was said in it, or else its prompt."""
    talk = trajectory.conversation
    spoken = [trajectory.text] if talk is None else [text_of(message) for message in talk.messages]
    if there := [text for text in spoken if text.strip()]:
        return f"after {short(there[-1])!r}"
    return f"with the prompt {short(as_text(prompt))!r}"


def short(text: str) -> str:
    """A text in one line, cut off where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= SHORT else f"{line[: SHORT - 1]}…"


def as_text(value: Any) -> str:
    """A text as it is; of a prompt's messages the text of the last."""
    return value if isinstance(value, str) else text_of(value[-1])


def counted(count: int, noun: str = "completion") -> str:
    """`1 completion`, `2,000 completions`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
