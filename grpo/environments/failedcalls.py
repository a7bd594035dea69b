"""The message that the model reads after a failed tool call, as in TRL, and a search for failed calls."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from grpo.types import Group, Message


def as_result(error: str) -> str:
    """Return the content of a failed call's result."""
    return str({"error": error})


def error_in(message: Message) -> str | None:
    """Return the error if this message is the result of a failed call; None for other messages."""
    content = message["content"]
    if message["role"] != "tool" or not isinstance(content, str) or not content.startswith("{'error': "):
        return None
    try:
        read = ast.literal_eval(content)
    except (ValueError, SyntaxError):
        return None
    return read["error"] if isinstance(read, dict) and as_result(read.get("error", "")) == content else None


def first_failed(groups: Sequence[Group]) -> tuple[str, str] | None:
    """Return the tool and the error of the first failed call; None if no call failed."""
    talks = (rollout.trajectory.conversation for group in groups for rollout in group.rollouts)
    for message in (message for talk in talks if talk is not None and talk.failed_calls for message in talk.messages):
        if (error := error_in(message)) is not None:
            return str(message["name"]), error
    return None
