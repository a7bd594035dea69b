"""Checks of prompts that are chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo.errors import UserError
from grpo.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTIONS = ("system", "developer")
"""Roles of messages that instruct the model."""


def check_messages(value: Any, where: str, prefilled: bool) -> list[Message]:
    """Check the messages of a prompt, and return them unchanged.

    `where` names column and row in errors. With `prefilled`, the last message may be the beginning of the answer.
    Raises UserError for a value that is not a list of messages with text, for an unknown role, and for messages that
    end with the assistant's answer.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"data.prompt: {where} is neither text nor a list of messages, but {_shown(value)}")
    if not value:
        raise UserError(f"data.prompt: {where} is an empty list of messages: add a message, or remove the row")
    for number, message in enumerate(value, 1):
        _check_message(message, f"message {number} in {where}")
    last = value[-1]
    if last["role"] == "assistant" and not prefilled:
        raise UserError(
            f"data.prompt: {where} ends with an answer of the assistant, {last['content'][:60]!r}, which the model "
            "would read in its prompt. Remove that message from the prompt (a reward can read it from another column), "
            "or set data.continue_final_message: true if the model should continue it"
        )
    return list(value)


def text_of(message: Message) -> str:
    """The text of a message, for display. Content blocks without text appear as their type in brackets."""
    content = message.get("content")
    if not isinstance(content, list):
        return "" if content is None else str(content)
    return "".join(str(block.get("text", f"[{block.get('type')}]")) for block in content)


def with_system(messages: Sequence[Message], system: str, where: str) -> list[Message]:
    """The messages with a system message before them. Raises UserError if they already have one."""
    if own := [message["role"] for message in messages if message["role"] in INSTRUCTIONS]:
        raise UserError(
            f"data.system: {where} already has a {own[0]} message, and data.system would be a second one: remove "
            "data.system, or the messages in the data"
        )
    return [{"role": "system", "content": system}, *messages]


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise UserError(
            f"data.prompt: {where} is neither text nor a list of messages with role and content: {_shown(message)}"
        )
    if message["role"] not in ROLES:
        raise UserError(f"data.prompt: {where} has the role {message['role']!r}; roles are {', '.join(ROLES)}")
    if not isinstance(message["content"], str):
        raise UserError(
            f"data.prompt: the content of {where} is not text, but {_shown(message['content'])}; images, audio and "
            "lists of content parts are not supported"
        )


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"
