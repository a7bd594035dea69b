"""The definition of a built-in task: problems in two splits, and two ways to answer each problem."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from grpo.builtin.playing import Toolbox, Turns, played, tools_of
from grpo.types import Message

Problem = tuple[int, ...]
"""The numbers that define a question; each is below 256."""
Manner = Callable[[Problem], str | Turns]
"""A way to answer: returns a text, or the turns of a conversation."""
HELD_OUT = 8
"""One in this many problems is held out."""


def in_any_order(problem: Problem) -> Problem:
    """Return the problem's parts, sorted: equal for problems that differ only in order."""
    return tuple(sorted(problem))


@dataclass(frozen=True, slots=True)
class Exercise:
    """A task with a good way to answer, which is always right, and a cheap way, which is sometimes right.

    `row` converts a problem to the dataset's columns, including `question`. Problems of the same `kin` are in the same
    split, so that held-out problems do not merely reorder training problems. A task with several turns has an
    `environment`, and may have additional `tools`.
    """

    everything: Callable[[], Iterable[Problem]]
    row: Callable[[Problem], dict[str, Any]]
    good: Manner
    cheap: Manner
    kin: Callable[[Problem], Problem] = in_any_order
    environment: Callable[[], Any] | None = None
    tools: tuple[Callable[..., Any], ...] = ()

    def problems(self, split: str) -> list[Problem]:
        """Return the problems of a split, `train` or `test`, in a fixed shuffled order."""
        mine = [one for one in self.everything() if self._held_out(one) == (split == "test")]
        return sorted(mine, key=_hash)

    def question(self, problem: Problem) -> str:
        return str(self.row(problem)["question"])

    @property
    def all_tools(self) -> Toolbox:
        """The functions that a model may call, by name, in the order of the prompt."""
        return tools_of(self.environment and self.environment(), self.tools)

    def conversation(self, problem: Problem, way: Manner) -> list[Message]:
        """Return the question and all messages after it, for a way of answering."""
        row, answer = self.row(problem), way(problem)
        question = {"role": "user", "content": str(row["question"])}
        if isinstance(answer, str):
            return [question, {"role": "assistant", "content": answer}]
        environment = self.environment and self.environment()
        if environment is not None:
            question["content"] += environment.reset(**row) or ""
        return [question, *played(answer, environment, tools_of(environment, self.tools))]

    def _held_out(self, problem: Problem) -> bool:
        return _hash(self.kin(problem))[0] % HELD_OUT == 0


def _hash(problem: Problem) -> bytes:
    return hashlib.sha256(bytes(problem)).digest()
