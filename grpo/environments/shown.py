"""Conversations for people to read: who said what, the tool calls, and what the model learns from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.data.messages import text_of
from grpo.data.prompts import last_text
from grpo.types import Message, Rollout, Task, Trajectory

MODEL = "model"
LONGEST_ARGUMENT = 200
"""Longest argument of a call that is shown in full, in characters."""


@dataclass(frozen=True, slots=True)
class Said:
    """One message, or a remark on how the conversation ended.

    who        `model`, `user` (an environment that answers as a user), or the name of the tool whose result this is;
               empty for a remark
    text       its text without tool calls
    calls      its tool calls, as `name(argument=value)`
    reward     the reward that the environment gave for the turn, if any
    advantage  the advantage of the turn, if each turn has its own advantage
    """

    who: str
    text: str
    calls: tuple[str, ...] = ()
    reward: float | None = None
    advantage: float | None = None

    @property
    def trained(self) -> bool:
        """Whether the model sampled it, and learns from it."""
        return self.who == MODEL

    def lines(self) -> list[str]:
        """Return a line for the text, a line per call, and a line for the reward and advantage if there are any."""
        who = f"{'' if self.trained else '← '}{self.who}: " if self.who else ""
        spoken = [f"{who}{self.text.strip()}"] if self.text.strip() or not self.calls else []
        noted = [] if self.reward is None else [f"reward {self.reward:g}"]
        noted += [] if self.advantage is None else [f"advantage {self.advantage:+.3f}"]
        return [*spoken, *(f"→ {call}" for call in self.calls), *([f"  ({', '.join(noted)})"] if noted else [])]


def told(rollout: Rollout) -> list[Said]:
    """Return the messages after the prompt and how the conversation ended; for a single turn, only the answer."""
    talk = rollout.trajectory.conversation
    if talk is None:
        return [Said(MODEL, rollout.trajectory.text)]
    return [*said_in(talk.messages, talk.turn_rewards, rollout.turn_advantages or ()), *end_of(rollout.trajectory)]


def said_in(
    messages: Sequence[Message], rewards: Sequence[float | None] = (), advantages: Sequence[float] = ()
) -> Iterator[Said]:
    """Yield what was said in each message. `rewards` and `advantages` have a value per turn of the model."""
    turn = 0
    for message in messages:
        if message["role"] != "assistant":
            who = str(message.get("name") or "tool") if message["role"] == "tool" else str(message["role"])
            yield Said(who, text_of(message))
            continue
        reward = rewards[turn] if turn < len(rewards) else None
        advantage = advantages[turn] if turn < len(advantages) else None
        yield Said(MODEL, text_of(message), tuple(map(_call, message.get("tool_calls") or ())), reward, advantage)
        turn += 1


def transcript(rollout: Rollout) -> str:
    """Return everything after the prompt as text: a single answer's text, or a conversation line by line."""
    if rollout.trajectory.conversation is None:
        return rollout.trajectory.text
    return "\n".join(line for said in told(rollout) for line in said.lines())


def asked(task: Task, trajectory: Trajectory | None = None) -> str:
    """Return the end of the prompt as the model saw it, with the text that the environment's `reset` added."""
    talk = None if trajectory is None else trajectory.conversation
    return last_text(task.prompt if talk is None or not talk.prompt else list(talk.prompt))


def end_of(trajectory: Trajectory) -> list[Said]:
    """Return a remark on how a conversation ended. Empty if it ended with the model's turn and has no outcome."""
    talk, reason = trajectory.conversation, trajectory.finish_reason
    assert talk is not None
    if talk.failure is not None:
        return [Said("", f"the conversation failed: {talk.failure}")]
    ended = {"stop": "", "done": "done"}.get(reason, f"ended by {reason}")
    outcome = "" if talk.outcome is None else f"rewarded {talk.outcome:g}"
    return [Said("", f"({', '.join(filter(None, [ended, outcome]))})")] if ended or outcome else []


def _call(call: Mapping[str, Any]) -> str:
    """Return a tool call in the notation of Python."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, Mapping):
        return f"{function.get('name')}({_short(str(arguments))})"
    return f"{function.get('name')}({', '.join(f'{name}={_value(value)}' for name, value in arguments.items())})"


def _value(value: Any) -> str:
    return _short(json.dumps(value, default=str, ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_ARGUMENT else f"{text[: LONGEST_ARGUMENT - 1]}…"
