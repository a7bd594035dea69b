"""A chat that continues an earlier answer: its prompt is the answer's tokens, never encoded again, and a suffix."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.environments.chat import Chat
from grpo.environments.template import Template, with_texts
from grpo.environments.thinking import Thinking
from grpo.serving.sessions import Answered
from grpo.types import Message

FOLLOWING = ("tool", "user")
"""Roles of messages that can follow a sampled turn."""


def prompt_after(
    chat: Chat,
    template: Template,
    thinking: Thinking | None,
    past: Answered,
    messages: Sequence[Message],
    keep_thinking: bool = False,
) -> tuple[int, ...] | None:
    """The tokens of `messages`, which continue the earlier answer `past`.

    Returns None if all messages must be rendered again: if the turn did not end as the template ends turns, if no such
    message can follow it, or if the template leaves out thinking that these tokens contain, unless `keep_thinking`.
    Raises UserError if the template refuses the messages, or the stand-in for the turn before them.
    """
    at = len(past.messages)
    answer, new = messages[at], messages[at + 1 :]
    if any(message["role"] not in FOLLOWING for message in new) or not chat.can_follow(new[0]["role"], past.token_ids):
        return None
    linked = _linked(answer, new)
    suffix = None if linked is None else chat.suffix_ids(past.token_ids, linked)
    if suffix is None:
        return None
    ids = (*past.prompt_ids, *past.token_ids, *suffix)
    if thinking is None or keep_thinking or not any(chat.drops(message["role"]) for message in new):
        return ids
    whole = template.render(with_texts(messages), generation=True)
    return ids if template.decode(ids).count(thinking.end) <= whole.count(thinking.end) else None


def _linked(answer: Message, new: Sequence[Message]) -> list[Message] | None:
    """The messages after an answer, with the tool's name in each tool result, and without ids: the order of the results
    identifies the calls. None if the results are in another order, or if there are more results than calls."""
    calls = list(answer.get("tool_calls") or ())
    linked: list[Message] = []
    for message in new:
        if message["role"] == "tool":
            call = calls.pop(0) if calls else None
            if call is None or _differ(call.get("id"), message.get("tool_call_id")):
                return None
            message = {"name": call["function"]["name"], **message}
            message.pop("tool_call_id", None)
        linked.append(message)
    return linked


def _differ(first: str | None, second: str | None) -> bool:
    """Whether both ids are given and differ."""
    return bool(first and second and first != second)
