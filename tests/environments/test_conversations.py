"""Conversations whose every token is known beforehand: what is said, what ends them, and what comes of it."""

from __future__ import annotations

import pytest
from environments.conversing import (
    ASKED,
    CALL,
    END,
    NO_END,
    OTHER,
    SCRIPT,
    TASK,
    Host,
    Numbers,
    numbered,
    one,
    play,
    result,
    said,
)
from environments.scripted import Scripted

from grpo.backend.random import derive_seed
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits, Reply
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.training.metrics import step_metrics
from grpo.training.update import Update
from grpo.types import BEHAVIOUR


def test_a_conversation_by_hand() -> None:
    """Ids, mask, messages, calls, rewards: two turns with calls, and an answer."""

    def tool(seat, name, arguments):
        value = numbered(seat, name, arguments)
        return {"42": value, "50": Reply(value=value, reward=0.25), "43": Reply(value=value, reward=0.5)}[value]

    host = Host(tool=tool, reward=lambda seat: 2.0)
    row = one(host)
    assert row.token_ids == (30, 60, 1, 9, 12, 42, 31, 61, 60, 1, 9, 12, 50, 12, 43, 32, 1)
    assert [int(trained) for trained in row.trained] == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert row.columns == {BEHAVIOUR: (0.0,) * 17}
    assert row.finish_reason == "stop"
    told = row.conversation
    assert told.environment == "Fake"
    assert told.prompt == tuple(ASKED)
    assert told.messages == (
        said("30 60 1", 60),
        result("42"),
        said("31 61 60 1", 61, 60),
        result("50", "t61"),
        result("43"),
        said("32 1"),
    )
    assert (told.calls, told.failed_calls, told.failure, told.home) == (3, 0, None, None)
    assert told.turn_rewards == (None, 0.75, None)
    assert (told.outcome, told.reward) == (2.0, 2.75)
    (seat,) = host.all
    seed = derive_seed(7, "environment:data", 4, 0)
    assert seat.asked == [
        ("reset", {"prompt": ASKED, "answer": "42"}, seed),
        ("tool", "t60", {"x": 60}),
        ("tool", "t61", {"x": 61}),
        ("tool", "t60", {"x": 60}),
        ("reward",),
    ]
    assert seat.released == 1


def test_the_metrics_of_a_group_by_hand() -> None:
    """One answers after three calls, one of which failed; one failed in its first call; one is out of turns."""

    def tool(seat, name, arguments):
        if seat.number == 1:
            return Reply("crash", error="gone")
        if seat.number == 2:
            return "23"
        if name == "t61":
            raise ValueError("50")
        return numbered(seat, name, arguments)

    host = Host(tool=tool, reset=lambda seat, *_: " 23" if seat.number == 2 else None)
    group = play(host, {**SCRIPT, 23: [CALL, END]}, ConversationLimits(max_turns=3), n=3)
    rows = [rollout.trajectory for rollout in group.rollouts]
    assert [row.finish_reason for row in rows] == ["stop", "failed", "max_turns"]
    assert [(row.turns, row.trained_tokens) for row in rows] == [(3, 9), (1, 3), (3, 6)]
    assert [len(row.conversation.turn_rewards) for row in rows] == [3, 1, 3]
    values = step_metrics(1, [group], Update(0.0, 0.0, {}), {}, {"rollout": 2.0}, has_tools=True).values
    assert values["tools/call_frequency"] == (3 + 1 + 3) / 3
    assert values["tools/failure_frequency"] == 1 / 7
    assert values["turns/mean"] == pytest.approx(7 / 3)
    stops = {name.removeprefix("stop/"): value for name, value in values.items() if name.startswith("stop/") and value}
    assert stops == {"stop": 1 / 3, "failed": 1 / 3, "max_turns": 1 / 3}
    assert values["num_tokens"] == 18  # what was sampled alone
    lengths = [values[f"completions/{name}_length"] for name in ("mean", "min", "max", "mean_terminated")]
    assert lengths == [6, 3, 9, 9]


def test_a_tool_that_fails_says_so_and_the_conversation_goes_on() -> None:
    def tool(seat, name, arguments):
        raise ValueError("43")

    row = one(Host(tool=tool), {21: [30, CALL, END], 13: [32, END]})
    assert row.conversation.messages == (said("30 60 1", 60), result("{'error': '43'}"), said("32 1"))
    assert (row.conversation.calls, row.conversation.failed_calls, row.conversation.failure) == (1, 1, None)
    assert row.finish_reason == "stop"


def test_a_tool_without_a_result_is_answered_with_nothing() -> None:
    row = one(Host(tool=lambda *_: None), {21: [CALL, END], 12: [32, END]})
    assert row.token_ids == (60, 1, 9, 12, 32, 1)
    assert row.conversation.messages[1] == result("")


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_an_environment_that_answers_as_the_user(kind: str) -> None:
    """Until it says that it is done. Its last word is heard by nobody, and is in the messages."""

    def step(seat, message):
        turn = sum(what[0] == "step" for what in seat.asked)
        return Reply(value=f"{40 + turn}", reward=float(turn), done=turn == 3)

    host = Host(kind, step=step)
    row = one(host, {21: [30, END], 41: [31, END], 42: [32, END]})
    assert row.token_ids == (30, 1, 9, 11, 41, 31, 1, 9, 11, 42, 32, 1)
    assert row.finish_reason == "done"
    users = [{"role": "user", "content": f"{40 + turn}"} for turn in (1, 2, 3)]
    assert row.conversation.messages == (
        said("30 1"), users[0], said("31 1"), users[1], said("32 1"), users[2],
    )  # fmt: skip
    assert row.conversation.turn_rewards == (1.0, 2.0, 3.0)
    assert (row.conversation.outcome, row.conversation.reward) == (None, 6.0)
    assert [given for what, *given in host.all[0].asked if what == "step"] == [[said(f"{30 + i} 1")] for i in range(3)]


def test_a_step_that_answers_nothing_ends_the_conversation() -> None:
    row = one(Host("messages", step=lambda *_: Reply(reward=0.5)), {21: [30, END]})
    assert (row.token_ids, row.finish_reason, row.conversation.turn_rewards) == ((30, 1), "done", (0.5,))


def test_a_step_may_say_several_messages_and_tools_stand_beside_it() -> None:
    more = [{"role": "system", "content": "41"}, {"role": "user", "content": "43"}]
    steps = iter([more, None])
    host = Host("messages", step=lambda *_: next(steps), tool=lambda *_: "42")
    row = one(host, {21: [CALL, END], 42: [30, END], 43: [31, END]})
    assert row.token_ids == (60, 1, 9, 12, 42, 30, 1, 9, 10, 41, 11, 43, 31, 1)
    assert row.conversation.messages == (said("60 1", 60), result("42"), said("30 1"), *more, said("31 1"))
    assert (row.conversation.calls, row.finish_reason) == (1, "done")


def test_a_tool_that_is_done_ends_it() -> None:
    row = one(Host(tool=lambda *_: Reply(value="42", reward=1.0, done=True)))
    assert (row.token_ids, row.finish_reason) == ((30, 60, 1), "done")
    assert row.conversation.messages == (said("30 60 1", 60), result("42"))
    assert row.conversation.reward == 1.0


def test_who_is_done_is_not_told_that_it_called_too_often() -> None:
    row = one(
        Host(tool=lambda *_: Reply(value="42", done=True)),
        {21: [CALL, OTHER, END]},
        ConversationLimits(max_tool_calls=1),
    )
    assert (row.finish_reason, row.conversation.calls) == ("done", 1)


@pytest.mark.parametrize("last", [NO_END, 33])
def test_a_turn_that_ends_otherwise_has_no_continuation(last: int) -> None:
    """By another stop token, or by the string 33. Nobody is asked."""
    host = Host(tool=numbered)
    conversations = Conversations({"": Table(host, Numbers())}, 0, 99)
    engine = RolloutEngine(Scripted({21: [CALL, last]}), Sampling(1.0, 40, stop=("33",)), conversations)
    row = engine.rollout([TASK], 1, 1.0, [1])[0].rollouts[0].trajectory
    assert (row.token_ids, row.finish_reason) == ((60, last), "stop")
    assert (row.conversation.calls, row.conversation.turn_rewards) == (0, (None,))
    assert row.conversation.messages[0]["content"] == ("60 " if last == 33 else "60 2")
    assert len(host.all[0].asked) == 1


def test_nobody_answers_a_turn_that_a_limit_ended() -> None:
    """Not even in plain text, where every turn could be followed."""
    host = Host("text", step=lambda *_: "21")
    conversations = Conversations(
        {"": Table(host, Numbers(ends=range(80)), ConversationLimits(max_turn_tokens=2))}, 0, 99
    )
    engine = RolloutEngine(Scripted({21: [30, 31, END]}), Sampling(1.0, 40), conversations)
    row = engine.rollout([TASK], 1, 1.0, [1])[0].rollouts[0].trajectory
    assert (row.token_ids, row.finish_reason) == ((30, 31), "max_turn_tokens")
    assert [what for what, *_ in host.all[0].asked] == ["reset"]


LIMITED = [
    (ConversationLimits(max_turns=1), 40, "max_turns", 3, 1, 2),  # the call is made, and its result is read by nobody
    (ConversationLimits(max_turns=2), 40, "max_turns", 10, 3, 5),
    (ConversationLimits(max_turns=3), 40, "stop", 17, 3, 6),  # the model ended it itself
    (ConversationLimits(max_tool_calls=1), 40, "max_tool_calls", 10, 1, 3),
    (ConversationLimits(max_tool_calls=2), 40, "max_tool_calls", 10, 2, 4),
    (ConversationLimits(max_tool_calls=3), 40, "stop", 17, 3, 6),
    (ConversationLimits(max_turn_tokens=3), 40, "max_turn_tokens", 9, 1, 3),
    (ConversationLimits(max_turn_tokens=5), 40, "stop", 17, 3, 6),
    (ConversationLimits(), 17, "stop", 17, 3, 6),
    (ConversationLimits(), 16, "length", 16, 3, 6),  # in the last turn
    (ConversationLimits(), 15, "length", 10, 3, 3),  # no room for the second results: they are taken back
    (ConversationLimits(), 6, "length", 3, 1, 1),
    (ConversationLimits(), 3, "length", 3, 1, 1),
    (ConversationLimits(), 2, "length", 2, 0, 1),
]


@pytest.mark.parametrize(("limits", "most", "reason", "tokens", "called", "messages"), LIMITED)
def test_limits(limits: ConversationLimits, most: int, reason: str, tokens: int, called: int, messages: int) -> None:
    host = Host(tool=numbered, reward=lambda seat: 1.0)
    row = one(host, limits=limits, most=most)
    whole = one(Host(tool=numbered))
    assert row.finish_reason == reason
    assert row.token_ids == whole.token_ids[:tokens]
    assert row.trained == whole.trained[:tokens]
    told = row.conversation
    assert told.calls == called
    assert len(told.messages) == messages
    cut = reason in ("length", "max_turn_tokens") and row.trained[-1] and row.token_ids[-1] != END
    assert told.messages[: messages - cut] == whole.conversation.messages[: messages - cut]
    assert len(told.turn_rewards) == sum(message["role"] == "assistant" for message in told.messages)
    assert told.outcome == 1.0
    assert host.all[0].released == 1


def test_a_step_is_still_taken_in_the_last_turn() -> None:
    host = Host("messages", step=lambda seat, message: Reply(value="21", reward=1.0))
    row = one(host, {21: [30, END]}, ConversationLimits(max_turns=2))
    assert (row.finish_reason, row.conversation.turn_rewards) == ("max_turns", (1.0, 1.0))
    host = Host("messages", step=lambda seat, message: Reply(value="21", done=len(seat.asked) == 3))
    assert one(host, {21: [30, END]}, ConversationLimits(max_turns=2)).finish_reason == "done"
