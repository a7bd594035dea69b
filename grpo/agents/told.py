"""What was said in a session, as one conversation."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.serving.sessions import Answered, marks_of
from grpo.types import Message

Transcript = tuple[tuple[Message, ...], tuple[Message, ...]]
"""The messages before the first answer, and all that came after them."""


def conversation_of(said: Sequence[Answered]) -> Transcript:
    """The answers of a session in their order, each with what its request added.

    A request that goes on from all before has added what is new at its end; any other, such as that of a second agent,
    has added those of its messages that are not in the conversation yet.
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
