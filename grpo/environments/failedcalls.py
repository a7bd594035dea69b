"""What the model reads where a call of a tool failed, as in TRL; and what a step's conversations show of such calls."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from grpo.types import Group, Message


def as_result(error: str) -> str:
    """The result of a call that failed."""
    return str({"error": error})


def error_in(message: Message) -> str | None:
    """Why the call failed of which this is the result; None of other messages."""
    content = message["content"]
    if message["role"] != "tool" or not isinstance(content, str) or not content.startswith("{'error': "):
        return None
    try:
        read = ast.literal_eval(content)
    except (ValueError, SyntaxError):
        return None
    return read["error"] if isinstance(read, dict) and as_result(read.get("error", "")) == content else None


def first_failed(groups: Sequence[Group]) -> tuple[str, str] | None:
    """The tool of the first call that failed, and why; None if none did."""
    talks = (rollout.trajectory.conversation for group in groups for rollout in group.rollouts)
    for message in (message for talk in talks if talk is not None and talk.failed_calls for message in talk.messages):
        if (error := error_in(message)) is not None:
            return str(message["name"]), error
    return None
