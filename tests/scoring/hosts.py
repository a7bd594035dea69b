"""A host in this process, as the scoring room sees one: seats that know their object, and rewards called on these."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any

from grpo.config import EnvironmentConfig
from grpo.environments.seats import Description, HostedReward, LoadedReward
from grpo.scoring.contract import Reward, calls_of
from grpo.scoring.scorer import Scorer
from grpo.types import Conversation, Failure, FailureKind, FinishReason, Group, Message, Rollout, Task, Trajectory


class FakeSeat:
    def __init__(self, thing: Any) -> None:
        self.thing, self.released = thing, 0

    def release(self) -> None:
        self.released += 1


class FakeHost:
    """`answers` are replies to give, in place of those of the reward itself."""

    def __init__(self, name: str = "Game", tools: Sequence[Mapping[str, Any]] = (), kind: str = "tools") -> None:
        self.description = Description(name, kind, tools, rewards=True)  # type: ignore[arg-type]
        self.loaded: dict[str, Reward] = {}
        self.calls: list[list[Any]] = []
        self.answers: list[Any] = []

    def load_reward(self, reward: HostedReward) -> LoadedReward:
        function = reward.function or reward.located.load()
        self.loaded[reward.located.name] = Reward(function, reward.kwargs, reward.form, reward.system)
        return LoadedReward(calls_of(function), False)

    def reward_problem(self, name: str, columns: Collection[str]) -> str | None:
        return self.loaded[name].problem([*columns, "environments"])

    def score(self, name: str, seats: Sequence[Any], columns: bytes, state: Mapping[str, Any]) -> Future[Any]:
        things = [seat.thing for seat in seats]
        assert not any(seat.released for seat in seats), "an environment that has been given back"
        self.calls.append(things)
        future: Future[Any] = Future()
        answer = self.loaded[name]({**pickle.loads(columns), "environments": things}, state)
        future.set_result(self.answers.pop(0) if self.answers else asdict(answer))
        return future

    def close(self) -> None: ...


def talk(
    said: Sequence[Message] | str = "",
    *,
    environment: str = "Game",
    turn_rewards: Sequence[float | None] = (),
    outcome: float | None = None,
    calls: tuple[int, int] = (0, 0),
    failed: FailureKind | None = None,
    ended: FinishReason = "stop",
    thing: Any = None,
    turns: int = 1,
    metrics: Mapping[str, float] | None = None,
) -> Rollout:
    """A conversation that the scorer may be given. `calls`: of tools, and how many of them failed."""
    messages = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
    failure = Failure(failed, "it is gone") if failed else None
    conversation = Conversation(
        environment,
        ({"role": "user", "content": "asked"},),
        tuple(messages),
        tuple(turn_rewards),
        outcome,
        *calls,
        failure,
        None if thing is None else FakeSeat(thing),
        metrics or {},
    )
    trained = (True, True, False) * (turns - 1) + (True, True)
    ids = tuple(range(len(trained)))
    reason: FinishReason = "failed" if failed else ended
    return Rollout(Trajectory(ids, trained, {"behaviour": (-1.0,) * len(ids)}, "all of it", reason, None, conversation))


def group(*rollouts: Rollout, place: int = 0, **columns: Any) -> Group:
    return Group(Task(place, [{"role": "user", "content": "bare"}], (1, 2), columns), rollouts)


def scorer_of(
    *hosts: FakeHost, rewards: Sequence[Any] = (), functions: Mapping[str, Any] | None = None, **own
) -> Scorer:
    """`own`: settings of the section `environment`, the same for all hosts."""
    configs = [EnvironmentConfig(use="game.py:Game", **own) for _ in hosts]
    return Scorer.of(rewards, functions=functions, hosts=list(zip(hosts, configs, strict=True)))


def with_thing(rollout: Rollout, thing: Any) -> Rollout:
    conversation = replace(rollout.trajectory.conversation, home=FakeSeat(thing))
    return replace(rollout, trajectory=replace(rollout.trajectory, conversation=conversation))
