"""Stand-ins for a conversation's others (a host whose environments are functions, a chat whose text is numbers), and
conversations with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from environments.scripted import Scripted

from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits, Description, Reply
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Group, Task, Trajectory


class Numbers:
    """Tokens as text. A turn ends with one of `ends`; each token from 60 to 69 is a call of a tool.

    Messages become their content's numbers (other words are 13) after a token that stands for the role, and what
    follows a turn is begun by 9. `names` are what tokens call, with which arguments.
    """

    roles = {"system": 10, "user": 11, "tool": 12}  # noqa: RUF012

    def __init__(self, ends: Collection[int] = range(1, 8, 2), names: Mapping[int, tuple[str, dict]] = {}) -> None:
        self.ends = set(ends)
        self.names = {token: (f"t{token}", {"x": token}) for token in range(60, 70)} | dict(names)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return [token for message in messages for token in self._ids(message)]

    def parse(self, token_ids: Sequence[int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": " ".join(map(str, token_ids))}
        called = [self.names[token] for token in token_ids if token in self.names]
        calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in called]
        return {**message, "tool_calls": calls} if calls else message

    def can_follow(self, role: str, turn_ids: Sequence[int]) -> bool:
        assert role == ("user" if self.names.keys().isdisjoint(turn_ids) else "tool")
        return turn_ids[-1] in self.ends

    def suffix_ids(self, turn_ids: Sequence[int], messages: Sequence[Mapping[str, Any]]) -> list[int] | None:
        return [9, *self.prompt_ids(messages)] if messages else None

    def _ids(self, message: Mapping[str, Any]) -> list[int]:
        content = [int(word) if word.isdigit() else 13 for word in message["content"].split()]
        return [self.roles[message["role"]], *content]


class LastTwo:
    """In the place of `Anew`: of each earlier turn the last two tokens stay, as if the others were thinking."""

    def __init__(self, chat: Numbers) -> None:
        self.chat = chat

    def prompt_ids(self, prompt: Sequence[Mapping[str, Any]], said: Sequence[Mapping[str, Any]]) -> list[int]:
        ids = self.chat.prompt_ids(prompt)
        for message in said:
            spoken = message["role"] == "assistant"
            ids += (
                [int(word) for word in message["content"].split()][-2:] if spoken else self.chat.prompt_ids([message])
            )
        return [*ids, 9]

    def lasting(self, prompt: Sequence[Mapping[str, Any]], prompt_ids: Sequence[int]) -> list[int]:
        return self.chat.prompt_ids(prompt)


def at_once(function: Callable[..., Any], *given: Any) -> Future[Reply]:
    """What a call comes to, now."""
    future: Future[Reply] = Future()
    future.set_result(_reply(function, *given))
    return future


def later(executor: Executor) -> Callable[..., Future[Reply]]:
    """Calls in other threads."""
    return lambda function, *given: executor.submit(_reply, function, *given)


def _reply(function: Callable[..., Any], *given: Any) -> Reply:
    try:
        value = function(*given)
    except Exception as error:
        return Reply("error", error=str(error))
    return value if isinstance(value, Reply) else Reply(value=value)


@dataclass
class Seat:
    """Records what is asked of it. `tool`, `step`, `reset` and `reward` answer; `state` is theirs."""

    host: Host
    group: int
    number: int
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    released: int = 0

    def reset(self, columns: Mapping[str, Any], seed: int) -> Future[Reply]:
        return self._ask("reset", columns, seed)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> Future[Reply]:
        return self._ask("tool", tool, arguments)

    def step(self, message: Mapping[str, Any]) -> Future[Reply]:
        return self._ask("step", message)

    def reward(self) -> Future[Reply]:
        return self._ask("reward")

    def release(self) -> None:
        self.released += 1

    def _ask(self, what: str, *given: Any) -> Future[Reply]:
        assert not self.released
        self.asked.append((what, *given))
        return self.host.run(self.host.functions.get(what, lambda *_: None), self, *given)


class Host:
    """`functions` by what they answer: `reset(seat, columns, seed)`, `tool(seat, name, arguments)`, …"""

    def __init__(self, kind: str = "tools", run: Callable[..., Future[Reply]] = at_once, **functions: Any) -> None:
        self.functions, self.run = functions, run
        self.description = Description("Fake", kind, (), "reward" in functions, "reset" in functions)  # type: ignore[arg-type]
        self.all: list[Seat] = []

    def seats(self, group: int, n: int) -> list[Seat]:
        made = [Seat(self, group, number) for number in range(n)]
        self.all += made
        return made


ASKED = [{"role": "user", "content": "20 21"}]
TASK = Task(4, ASKED, (11, 20, 21), {"answer": "42"})
CALL, OTHER, END, NO_END = 60, 61, 1, 2  # tokens: calls of two tools, a turn's end, and an end that is none
SCRIPT = {21: [30, CALL, END], 42: [31, OTHER, CALL, END], 43: [32, END]}
"""A call, then two, then an answer."""


def calls(*tokens: int) -> list[dict]:
    return [{"type": "function", "function": {"name": f"t{token}", "arguments": {"x": token}}} for token in tokens]


def said(content: str, *called: int) -> dict:
    return {"role": "assistant", "content": content} | ({"tool_calls": calls(*called)} if called else {})


def result(content: str, name: str = "t60") -> dict:
    return {"role": "tool", "name": name, "content": content}


def numbered(seat, name, arguments) -> str:
    """42 for the first call, 50 for the second, 43 for the third."""
    return ("42", "50", "43")[sum(what[0] == "tool" for what in seat.asked) - 1]


def play(
    host: Host,
    script: dict = SCRIPT,
    limits: ConversationLimits = ConversationLimits(),  # noqa: B008
    most: int = 40,
    n: int = 1,
    task: Task = TASK,
    longest: int = 99,
    **table,
) -> Group:
    conversations = Conversations({"": Table(host, Numbers(), limits, **table)}, 7, longest)
    engine = RolloutEngine(Scripted(script), Sampling(1.0, most), conversations)
    (group,) = engine.rollout([task], n, 1.0, mx.random.key(0))
    return group


def one(*given, **named) -> Trajectory:
    (rollout,) = play(*given, **named).rollouts
    return rollout.trajectory
