"""What a conversation has of its environment: a seat, wherever the environment's object lives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from grpo.plugins import Function, Located
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
               `rollout`: it makes trajectories by itself, by `async def rollout(self, task, sampler)`; `agent`: it asks
               the model through an endpoint, when its one method `run` is called, which is no tool
    tools      the JSON schemas of all tools, as chat templates take them (`{"type": "function", "function": {...}}`)
    rewards    whether it has `get_reward`
    steps      the calls whose result may be a `Step`, which may reward: `step` where that answers the model, and those
               of the tools whose return annotation does not rule it out
    resets     whether it has `reset`, which may add to the prompt, or writes its prompts itself, as agents do
    withheld   public methods with a docstring that are no tools, because `step(text)` is spoken to in text alone
    """

    name: str
    kind: Literal["tools", "messages", "text", "rollout", "agent"] = "tools"
    tools: Sequence[Mapping[str, Any]] = ()
    rewards: bool = False
    resets: bool = False
    withheld: Sequence[str] = ()
    steps: Sequence[str] = ()

    @property
    def may_reward(self) -> bool:
        """Whether a conversation can have a reward from it at all."""
        return self.rewards or bool(self.steps)


@dataclass(frozen=True, slots=True)
class HostedReward:
    """A reward function that takes `environments`, loaded where they live.

    located   its name and place
    kwargs    the recipe's arguments for it
    timeout   seconds that one call may take
    form      the form of completions that it reads, if the recipe says so; `system` is the message before text prompts
    function  the function itself, where it was given as an object: for hosts in this process; others import it
    """

    located: Located
    kwargs: Mapping[str, Any]
    timeout: float = 60.0
    form: Literal["text", "messages"] | None = None
    system: str | None = None
    function: Function | None = None


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """What its file says of a hosted reward: what one call gets (`step`, `group` or `completion`); whether it costs."""

    calls: str
    paid: bool


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

    def problem(self, columns: Collection[str]) -> str | None:
        """Why `reset` could not be called with these columns of the dataset; None if it can be."""
        ...

    def load_reward(self, reward: HostedReward) -> LoadedReward:
        """Load a reward function into every process. Raises UserError if it cannot be had, and says why."""
        ...

    def reward_problem(self, name: str, columns: Collection[str]) -> str | None:
        """Why a loaded reward could not be called with these columns and `environments`; None if it can be."""
        ...

    def score(self, name: str, seats: Sequence[Seat], columns: bytes, state: Mapping[str, Any]) -> Future[Any]:
        """Call a loaded reward once, with the environments of `seats`: of one group, or some of its seats.

        `columns` is a pickled dictionary with a value for each seat by name, without `environments`. `state` is what
        rewards are told of the trainer. The future has a dictionary of the fields of the scoring room's `Answer`
        (`values`, `failures` by place, `extras`, `metrics`, `seconds`, `kind`, `fatal`), and never raises. A seat that
        is lost has a failure; the reward is called with the others.
        """
        ...

    def close(self) -> None:
        """End all processes, and what they have started."""
        ...


@dataclass(frozen=True, slots=True)
class ConversationLimits:
    """What ends a conversation early; None: no limit. Each is a stop reason of its name."""

    max_turns: int | None = None
    max_tool_calls: int | None = None
    max_turn_tokens: int | None = None
    rollout_timeout: float | None = None
