"""Conversations to and from JSON, for the files of a run."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from grpo.backend.secrets import masked
from grpo.types import Conversation, Failure

TOLD = tuple(field.name for field in fields(Conversation) if field.name not in ("failure", "home"))
"""The fields of a conversation that are written unchanged."""


def written(talk: Conversation | None) -> str | None:
    """Return the conversation as JSON, without its home, and with secrets masked, because tools may quote anything."""
    if talk is None:
        return None
    plain = {name: getattr(talk, name) for name in TOLD}
    failure = talk.failure and {"kind": talk.failure.kind, "error": talk.failure.error}
    return masked(json.dumps({**plain, "failure": failure}, default=str))


def conversation(text: str | None) -> Conversation | None:
    """Return the conversation that `written` wrote. Fields of later versions are ignored."""
    if text is None:
        return None
    said: dict[str, Any] = json.loads(text)
    failure = None if said["failure"] is None else Failure(**said["failure"])
    lists = {name: tuple(said[name]) for name in ("prompt", "messages", "turn_rewards")}
    return Conversation(**{name: said[name] for name in TOLD if name in said} | lists, failure=failure)
