"""Prompts of chat messages: which of them a model can be asked to answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo.errors import UserError
from grpo.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTIONS = ("system", "developer")
"""Roles of messages that tell the model how to answer."""


def check_messages(value: Any, where: str, prefilled: bool) -> list[Message]:
    """The messages of a prompt, as they are.

    `where` names column and row in errors; `prefilled` says that the last message may be the beginning of the answer.
    Raises UserError for what is not a list of messages with text, an unknown role, and messages that end with the
    assistant's answer.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"data.prompt: {where} is neither text nor a list of messages, but {_shown(value)}")
    if not value:
        raise UserError(f"data.prompt: {where} is an empty list of messages: leave out the row, or fill it")
    for number, message in enumerate(value, 1):
        _check_message(message, f"message {number} in {where}")
    last = value[-1]
    if last["role"] == "assistant" and not prefilled:
        raise UserError(
            f"data.prompt: {where} ends with an answer of the assistant, {last['content'][:60]!r}, and the model would "
            "read it in its prompt. Take that message out of the prompt (a reward can read it from a column of its "
            "own), or set data.continue_final_message: true if the model is to continue it"
        )
    return list(value)


def text_of(message: Message) -> str:
    """The text of a message, for people; of content blocks the texts, and the types of others in brackets."""
    content = message.get("content")
    if not isinstance(content, list):
        return "" if content is None else str(content)
    return "".join(str(block.get("text", f"[{block.get('type')}]")) for block in content)


def with_system(messages: Sequence[Message], system: str, where: str) -> list[Message]:
    """The messages after a system message. Raises UserError where they have one already."""
    if own := [message["role"] for message in messages if message["role"] in INSTRUCTIONS]:
        raise UserError(
            f"data.system: {where} has a {own[0]} message of its own, and data.system would be a second one: leave out "
            "data.system, or the messages"
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
            f"data.prompt: the content of {where} is not text, but {_shown(message['content'])}; images, sounds and "
            "lists of parts are not supported"
        )


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"
