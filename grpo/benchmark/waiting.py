"""`grpo bench waiting`: conversations with slow environments, with and without a barrier after each turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from threading import Lock, Timer
from typing import Any, cast

from grpo.backend.random import derive_key, derive_seed
from grpo.benchmark.models import model_for, vocabulary_of
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.rollout import untold
from grpo.benchmark.setting import Setting
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits, Description, Reply
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Group, Message, Task

ANSWER = 16
"""Number of tokens of an environment's answer."""
ALONE = "the longest row alone"


@dataclass(frozen=True, slots=True)
class Sleeps:
    """The seconds of an answer: `seconds` × u ** `power`, with a u for each row and turn, uniform in [0, 1)."""

    seconds: float
    power: float

    def of(self, group: int, row: int, turn: int) -> float:
        return float(self.seconds * random.Random(derive_seed(0, "sleep", group, row, turn)).random() ** self.power)


def waiting_costs(setting: Setting, turns: int, sleeps: Sleeps) -> list[Measurement]:
    """Seconds of a rollout whose rows have `turns` turns of `completion_length` tokens on average, with an answer after
    each turn.

    The lower bound is the time of the longest row alone: its answers, and decoding its tokens without other rows.
    """
    model = model_for(setting)
    generator = untold(model, setting.rows)
    generator.stop_ids = frozenset(range(0, vocabulary_of(model), setting.completion_length))
    tasks = [Task(i, "", tuple(ids), {}) for i, ids in enumerate(setting.draw(vocabulary_of(model)))]
    rollout = _Rollout(generator, tasks, setting, turns, sleeps)
    groups = rollout.run(_Answers(sleeps))
    sides = [
        Side("a barrier each turn", lambda: _timed(lambda: rollout.run(_Answers(sleeps, together=setting.rows)))),
        Side("nobody waits", lambda: _timed(lambda: rollout.run(_Answers(sleeps)))),
        Side(ALONE, lambda: {"s": max(rollout.alone(groups))}, against="nobody waits"),
    ]
    return alternate(f"{turns} turns, up to {sleeps.seconds:g} s after each, {setting}", sides, setting.runs)


@dataclass(frozen=True)
class _Rollout:
    generator: Generator
    tasks: Sequence[Task]
    setting: Setting
    turns: int
    sleeps: Sleeps

    def run(self, host: _Answers) -> list[Group]:
        most = self.turns * (20 * self.setting.completion_length + ANSWER)
        table = Table(cast("Any", host), _Chat(), ConversationLimits(max_turns=self.turns))
        engine = RolloutEngine(self.generator, Sampling(max_tokens=most), Conversations({"": table}, 0, 1_000_000))
        return engine.rollout(self.tasks, self.setting.completions, 1.0, derive_key(0, "draw"))

    def alone(self, groups: Sequence[Group]) -> list[float]:
        """The seconds of each row alone: its answers, and decoding its tokens without other rows."""
        rows = [(g, i, r.trajectory) for g, group in enumerate(groups) for i, r in enumerate(group.rollouts)]
        longest = max(row.trained_tokens for *_, row in rows)
        request, stops = Request(groups[0].task.prompt_ids), self.generator.stop_ids
        self.generator.stop_ids = frozenset()
        start = time.perf_counter()
        self.generator.generate([request], Sampling(max_tokens=longest), derive_key(0, "draw"))
        token = (time.perf_counter() - start) / longest
        self.generator.stop_ids = stops
        slept = [sum(self.sleeps.of(g, i, turn) for turn in range(self.turns)) for g, i, _ in rows]
        return [seconds + token * row.trained_tokens for seconds, (*_, row) in zip(slept, rows, strict=True)]


class _Answers:
    """A host whose environments answer after a sleep; with a barrier, when `together` environments have slept."""

    description = Description("Sleeps", "messages")

    def __init__(self, sleeps: Sleeps, together: int = 1) -> None:
        self.sleeps, self._together, self._lock = sleeps, together, Lock()
        self._waiting: list[tuple[float, Future[Reply]]] = []

    def seats(self, group: int, n: int) -> list[_Seat]:
        return [_Seat(self, group, row) for row in range(n)]

    def answer(self, seconds: float) -> Future[Reply]:
        future: Future[Reply] = Future()
        with self._lock:
            self._waiting.append((seconds, future))
            if len(self._waiting) == self._together:
                told, self._waiting = self._waiting, []
                Timer(max(slept for slept, _ in told), _tell, [[future for _, future in told]]).start()
        return future


def _tell(futures: Sequence[Future[Reply]]) -> None:
    for future in futures:
        future.set_result(Reply(value="answer"))


@dataclass
class _Seat:
    host: _Answers
    group: int
    row: int
    turns: Any = field(default_factory=count)

    def reset(self, columns: Mapping[str, Any], seed: int) -> Future[Reply]:  # noqa: ARG002
        begun: Future[Reply] = Future()
        begun.set_result(Reply())
        return begun

    def step(self, message: Message) -> Future[Reply]:  # noqa: ARG002
        return self.host.answer(self.host.sleeps.of(self.group, self.row, next(self.turns)))

    def release(self) -> None: ...


class _Chat:
    """A chat in which the same tokens follow every turn."""

    def prompt_ids(self, messages: Sequence[Message]) -> Sequence[int]:
        raise AssertionError(f"prompts are given as tokens, not as {messages}")

    def parse(self, token_ids: Sequence[int]) -> Message:
        return {"role": "assistant", "content": str(len(token_ids))}

    def can_follow(self, role: str, turn_ids: Sequence[int]) -> bool:  # noqa: ARG002
        return True

    def suffix_ids(self, turn_ids: Sequence[int], messages: Sequence[Message]) -> Sequence[int]:  # noqa: ARG002
        return range(1, 1 + ANSWER)


def _timed(work: Callable[[], object]) -> Values:
    start = time.perf_counter()
    work()
    return {"s": time.perf_counter() - start}
