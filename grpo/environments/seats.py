"""What a conversation has of its environment: a seat, wherever the environment's object lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from grpo.types import Message

Content = str | list[dict[str, Any]]
"""Of a message: text, or content blocks."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call came to.

    kind     `ok`; `error`: the called code raised, or returned what it may not, and the object is still there;
             `timeout`, `crash`, `memory`: the call took too long, or ended its process, and the seat is lost
    value    what was returned: of `reset` and of tools content or None, of `step` messages or None, of `reward` a float
             or None
    reward   what a `Step` gave for the turn
    done     whether a `Step` ended the conversation
    error    what went wrong, in words, if `kind` is not `ok`
    """

    kind: Literal["ok", "error", "timeout", "crash", "memory"] = "ok"
    value: Any = None
    reward: float | None = None
    done: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Description:
    """What an environment and its tools are, found out where they live.

    name       the class's name, or that which the recipe gives
    kind       `tools`: the model calls methods; `messages`, `text`: `step(message)`, `step(text)` answers as users do;
               `rollout`: it makes trajectories by itself, by `async def rollout(self, task, sampler)`
    tools      the JSON schemas of all tools, as chat templates take them (`{"type": "function", "function": {...}}`)
    rewards    whether it has `get_reward`
    resets     whether it has `reset`, which may add to the prompt
    """

    name: str
    kind: Literal["tools", "messages", "text", "rollout"] = "tools"
    tools: Sequence[Mapping[str, Any]] = ()
    rewards: bool = False
    resets: bool = False


class Seat(Protocol):
    """The environment of one conversation. Its calls are made one after another, and never raise."""

    def reset(self, columns: Mapping[str, Any], seed: int) -> Future[Reply]:
        """Begin: the object is made, or taken from an earlier conversation, and its `reset` called with the columns."""
        ...

    def call(self, tool: str, arguments: Mapping[str, Any]) -> Future[Reply]:
        """Call a tool by the name in its schema."""
        ...

    def step(self, message: Message) -> Future[Reply]:
        """Say what the model said to an environment that answers as the user does."""
        ...

    def reward(self) -> Future[Reply]:
        """Ask for the environment's `get_reward`."""
        ...

    def release(self) -> None:
        """The conversation is over, and scored: the object may serve another one."""
        ...


class Host(Protocol):
    """Where the environments of one name live, and the tools beside them."""

    @property
    def description(self) -> Description: ...

    def seats(self, group: int, n: int) -> Sequence[Seat]:
        """Seats for the conversations of group number `group` of a rollout, all in one process."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a conversation early; None: no limit. Each is a stop reason of its name."""

    max_turns: int | None = None
    max_tool_calls: int | None = None
    max_turn_tokens: int | None = None
    rollout_timeout: float | None = None
