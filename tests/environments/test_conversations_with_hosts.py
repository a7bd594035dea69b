"""Conversations with real hosts: environments and tools in processes, and in this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import games
import mlx.core as mx
import pytest
from environments.conversing import Numbers
from environments.scripted import Scripted

from grpo.config.environment import EnvironmentConfig
from grpo.environments.conversations import Conversations
from grpo.environments.host import EnvironmentHost
from grpo.environments.making import make_host
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Failure, Task, Trajectory

GAMES = Path(__file__).with_name("games.py")
TASK = Task(0, [{"role": "user", "content": "20"}], (11, 20), {"start": 1})
NAMES = {60: ("move", {"by": 2}), 61: ("move", {"by": 99}), 62: ("jump", {}), 63: ("wait", {"seconds": 0.3})}
TURNS = {13: [30, 60, 1], 3: [31, 61, 62, 1], 29: [32, 1]}
HERE = pytest.mark.parametrize("inline", [False, True], ids=["process", "inline"])


@contextmanager
def hosted(name: str, inline: bool, **settings) -> Iterator[EnvironmentHost]:
    config = EnvironmentConfig(use=f"{GAMES}:{name}", **settings)
    host = make_host(config, given=getattr(games, name) if inline else None)
    try:
        yield host
    finally:
        host.close()


def rows(host: EnvironmentHost, script: dict, limits: ConversationLimits | None = None, n: int = 2) -> list[Trajectory]:
    chat = Numbers(names=NAMES)
    ids = chat._ids  # an error's words are 29, and no turn of the script begins twice
    chat._ids = lambda message: [12, 29] if "error" in message["content"] else ids(message)
    conversations = Conversations({"": Table(host, chat, limits or ConversationLimits())}, 0, 99)
    engine = RolloutEngine(Scripted(script), Sampling(1.0, 60), conversations)
    (group,) = engine.rollout([TASK], n, 1.0, mx.random.key(0))
    return [rollout.trajectory for rollout in group.rollouts]


@HERE
def test_tools_that_a_class_has(inline: bool) -> None:
    with hosted("Walk", inline) as host:
        for row in rows(host, TURNS):
            told = row.conversation
            assert told.prompt == ({"role": "user", "content": "20 You are at 1."},)
            assert [message["content"] for message in told.messages[1::2]][:1] == ["3"]
            assert [message["content"] for message in told.messages if message["role"] == "tool"] == [
                "3", "{'error': 'Game over.'}", "{'error': 'Tool jump not found.'}",
            ]  # fmt: skip
            assert (told.environment, told.calls, told.failed_calls) == ("Walk", 3, 2)
            assert (told.outcome, row.finish_reason) == (3.0, "stop")
            assert row.token_ids == (30, 60, 1, 9, 12, 3, 31, 61, 62, 1, 9, 12, 29, 12, 29, 32, 1)


@HERE
def test_one_that_answers_as_the_user(inline: bool) -> None:
    with hosted("Guess", inline) as host:
        for row in rows(host, {20: [30, 1], 1: [31, 1]}, ConversationLimits(max_turns=2)):
            assert row.token_ids == (30, 1, 9, 11, 30, 1, 31, 1)
            assert row.conversation.turn_rewards == (1.0, 1.0)
            assert (row.conversation.outcome, row.conversation.reward) == (0.5, 2.5)
            assert row.finish_reason == "max_turns"


@HERE
def test_a_tool_that_takes_too_long_fails_its_conversation(inline: bool) -> None:
    with hosted("Walk", inline, timeout=0.05) as host:
        for row in rows(host, {13: [63, 1]}):
            assert row.finish_reason == "failed"
            assert row.token_ids == (63, 1)
            assert row.conversation.failure == Failure("timeout", "'wait' gave no answer in 0.05 s")


@HERE
def test_seats_serve_again_after_a_conversation_that_had_no_time(inline: bool) -> None:
    """Its call goes on; then the object is another conversation's."""
    with hosted("Walk", inline) as host:
        for row in rows(host, {13: [63, 1]}, ConversationLimits(rollout_timeout=0.05)):
            assert (row.finish_reason, row.conversation.outcome) == ("rollout_timeout", None)
        for row in rows(host, TURNS):
            assert (row.finish_reason, row.conversation.outcome) == ("stop", 3.0)
