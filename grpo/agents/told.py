"""Joins the requests and answers of a session into one conversation."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.serving.sessions import Answered, marks_of
from grpo.types import Message

Transcript = tuple[tuple[Message, ...], tuple[Message, ...]]
"""The messages before the first answer, and all messages after them."""


def conversation_of(said: Sequence[Answered]) -> Transcript:
    """Return the answers of a session in their order, each after the new messages of its request.

    If a request continues the whole conversation, its new messages are those at its end. In any other request, such as
    one of a second agent, they are the messages that are not in the conversation yet.
    """
    if not said:
        return (), ()
    prompt = said[0].messages
    told: list[Message] = []
    known = list(marks_of(prompt))
    for one in said:
        marks = marks_of(one.messages)
        goes_on = list(marks[: len(known)]) == known
        new = range(len(known), len(marks)) if goes_on else [at for at, mark in enumerate(marks) if mark not in known]
        added = [*(one.messages[at] for at in new), one.answer]
        told += added
        known += marks_of(added)
    return prompt, tuple(told)
