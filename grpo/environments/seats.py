"""The protocol between a conversation and its environment: a seat, in any process, and the host that provides it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from grpo.plugins import Function, Located
from grpo.types import Message

Content = str | list[dict[str, Any]]
"""The content of a message: text, or content blocks."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a call.

    kind     `ok`; `error`: the called code raised, or returned an invalid value, and the object still exists;
             `timeout`, `crash`, `memory`: the call took too long, or ended its process, and the seat is lost
    value    the returned value: content or None from `reset` and tools, messages or None from `step`, a float or None
             from `reward`
    reward   the reward of the turn, if the call returned a `Step` with a reward
    done     whether a `Step` ended the conversation
    error    the error message if `kind` is not `ok`
    """

    kind: Literal["ok", "error", "timeout", "crash", "memory"] = "ok"
    value: Any = None
    reward: float | None = None
    done: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Description:
    """What an environment and its tools are, found by loading them in the process where they live.

    name       the class's name, or the name in the recipe
    kind       `tools`: the model calls methods; `messages`, `text`: `step(message)` or `step(text)` answers as a user;
               `rollout`: `async def rollout(self, task, sampler)` makes whole trajectories; `agent`: its method `run`,
               which is not a tool, calls the model through an endpoint
    tools      the JSON schemas of all tools, as chat templates take them (`{"type": "function", "function": {...}}`)
    rewards    whether it has `get_reward`
    steps      the calls that may return a `Step`, and with it a reward: `step` if it answers the model, and each tool
               whose return annotation does not rule it out
    resets     whether it has `reset`, which may add to the prompt, or writes its own prompts, as agents do
    withheld   public methods with a docstring that are not tools, because the model talks to `step(text)` in plain text
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
        """Whether the environment or a tool can give a conversation a reward."""
        return self.rewards or bool(self.steps)


@dataclass(frozen=True, slots=True)
class HostedReward:
    """A reward function that takes `environments`, loaded where they live.

    located   its name and place
    kwargs    the recipe's arguments for it
    timeout   time limit of a call, in seconds
    form      the form of the completions that it reads, if the recipe sets it
    system    the system message before prompts that are text
    function  the function itself, if it was passed as an object: only for hosts in this process; other hosts import it
    """

    located: Located
    kwargs: Mapping[str, Any]
    timeout: float = 60.0
    form: Literal["text", "messages"] | None = None
    system: str | None = None
    function: Function | None = None


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """What the file of a hosted reward declares: what one call gets (`step`, `group`, or `completion`), and whether
    calls cost money."""

    calls: str
    paid: bool


class Seat(Protocol):
    """The environment of one conversation. Its calls are made one after another, and never raise."""

    def reset(self, columns: Mapping[str, Any], seed: int) -> Future[Reply]:
        """Create the object, or reuse the object of an earlier conversation, and call its `reset` with the columns."""
        ...

    def call(self, tool: str, arguments: Mapping[str, Any]) -> Future[Reply]:
        """Call a tool by the name in its schema."""
        ...

    def step(self, message: Message) -> Future[Reply]:
        """Pass the model's message to an environment that answers as a user."""
        ...

    def reward(self) -> Future[Reply]:
        """Call the environment's `get_reward`."""
        ...

    def release(self) -> None:
        """End the conversation, which has been scored: the object may serve another conversation."""
        ...


class Host(Protocol):
    """Provides the environments of one name, together with their tools."""

    @property
    def description(self) -> Description: ...

    def seats(self, group: int, n: int) -> Sequence[Seat]:
        """Return `n` seats, all in one process, for the conversations of group number `group` of a rollout."""
        ...

    def problem(self, columns: Collection[str]) -> str | None:
        """Return why `reset` cannot be called with these columns of the dataset; None if it can."""
        ...

    def load_reward(self, reward: HostedReward) -> LoadedReward:
        """Load a reward function into every process. Raises UserError, with the reason, if it cannot be loaded."""
        ...

    def reward_problem(self, name: str, columns: Collection[str]) -> str | None:
        """Return why a loaded reward cannot be called with these columns and `environments`; None if it can."""
        ...

    def score(self, name: str, seats: Sequence[Seat], columns: bytes, state: Mapping[str, Any]) -> Future[Any]:
        """Call a loaded reward once, with the environments of `seats`, which are all or some seats of one group.

        `columns` is a pickled dictionary of lists by column name, with a value per seat, without `environments`.
        `state` is the trainer state that rewards get. The future's result is a dictionary with the fields of the
        scoring room's `Answer` (`values`, `failures` by place, `extras`, `metrics`, `seconds`, `kind`, `fatal`). It
        never raises. A lost seat counts as a failure; the reward is called with the other seats.
        """
        ...

    def close(self) -> None:
        """End all processes, and all processes that they have started."""
        ...


@dataclass(frozen=True, slots=True)
class ConversationLimits:
    """Limits that end a conversation early; None: no limit. The stop reason has the name of the limit."""

    max_turns: int | None = None
    max_tool_calls: int | None = None
    max_turn_tokens: int | None = None
    rollout_timeout: float | None = None
