"""Rows that wait hold nobody up, and nothing is computed twice for them."""

from __future__ import annotations

from concurrent.futures import Future

import mlx.core as mx
import pytest
from environments.conversing import Host, Numbers, at_once
from environments.scripted import Scripted
from generation.ways import STOPS, generator_of

from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits, Reply
from grpo.generation import batchsession, shared
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Group, Task

TASKS = [Task(place, "20 21", (11, 20, 21), {}) for place in range(2)]


def test_others_play_to_their_end_while_one_waits() -> None:
    """Its tool answers when all others have ended, those of its own group included: a barrier would wait for ever."""
    slow: Future[Reply] = Future()
    ended: list[int] = []

    def run(function, seat, *given):
        if (seat.group, seat.number) == (0, 1) and given and given[0] == "t60" and len(seat.asked) == 2:
            return slow
        return at_once(function, seat, *given)

    def reward(seat):
        ended.append((seat.group, seat.number))
        if len(ended) == 5:
            slow.set_result(Reply(value="42"))
        return 1.0

    host = Host(run=run, tool=lambda *_: "42", reward=reward)
    conversations = Conversations({"": Table(host, Numbers(), ConversationLimits(max_turns=4))}, 0, 99)
    engine = RolloutEngine(Scripted({21: [60, 1], 42: [30, 60, 1]}, slots=2), Sampling(1.0, 60), conversations)
    groups = engine.rollout(TASKS, 3, 1.0, mx.random.key(0))
    assert ended[-1] == (0, 1)
    assert len({r.trajectory.token_ids for group in groups for r in group.rollouts}) == 1


@pytest.mark.parametrize("way", ["joined layers", "batch caches"])
def test_only_what_is_told_goes_through_the_model_again(way: str, monkeypatch) -> None:
    """But for its last token, which decoding feeds. The token that ended the turn may have been fed with its neighbors.
    What is the row's own of a prompt goes through once, and the rest once for the group.
    """
    fed: list[int] = []
    for module in (shared, batchsession):
        original = module.extended

        def extended(model, rows, token_ids, together, original=original):
            fed.extend(map(len, token_ids))
            return original(model, rows, token_ids, together)

        monkeypatch.setattr(module, "extended", extended)
    host = Host("messages", reset=lambda seat, *_: " 70 71" * seat.number, step=lambda *_: "42 43")
    chat = Numbers(ends=STOPS)
    chat.names = {}
    conversations = Conversations({"": Table(host, chat, ConversationLimits(max_turns=4))}, 0, 99)
    groups: list[Group] = RolloutEngine(generator_of(way, 3), Sampling(1.0, 60), conversations).rollout(
        TASKS, 3, 1.0, mx.random.key(1)
    )
    rows = [rollout.trajectory for group in groups for rollout in group.rollouts]
    answers = sum(row.token_ids[i : i + 4] == (9, 11, 42, 43) for row in rows for i in range(len(row.token_ids)))
    assert answers > 6
    for length in [2, 4] * len(TASKS):
        fed.remove(length)
    assert len(found := [length for length in fed if length]) == answers
    assert set(found) <= {3, 4}
