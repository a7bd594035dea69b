"""Conversations whose every token is known beforehand: what is said, what ends them, and what comes of it."""

from __future__ import annotations

import mlx.core as mx
import pytest
from environments.conversing import Host, Numbers
from environments.scripted import Scripted

from grpo.backend.random import derive_seed
from grpo.environments.conversations import Conversations
from grpo.environments.openings import messages_of, with_added
from grpo.environments.play import Table
from grpo.environments.sampler import Sampler, common_prefix
from grpo.environments.seats import ConversationLimits, Reply
from grpo.errors import RunError, UserError
from grpo.generation.rows import Row
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.training.metrics import step_metrics
from grpo.training.update import Update
from grpo.types import BEHAVIOUR, Failure, Group, Task, Trajectory

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


KINDS = ["error", "timeout", "crash", "memory"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["reset", "tool", "step", "reward"])
def test_a_failure_ends_its_conversation_alone(where: str, kind: str) -> None:
    def breaks(seat, *given):
        return Reply(kind, error="broken") if seat.number == 1 else "43" if where == "tool" else None

    answers = {"reward": lambda seat: 1.0, "tool": lambda *_: "43", where: breaks}
    host = Host("messages" if where == "step" else "tools", **answers)
    said = [30, END] if where == "step" else [30, CALL, END]
    script = {21: said, 43: [32, END], 13: [33, END]}
    good, bad, other = (rollout.trajectory for rollout in play(host, script, n=3, keeps_seats=True).rollouts)
    assert good.token_ids == other.token_ids
    assert good.conversation.failure is other.conversation.failure is None
    assert good.conversation.home is host.all[0]
    if (where, kind) == ("tool", "error"):
        assert bad.finish_reason == "stop"
        assert bad.conversation.failed_calls == 1
        return
    assert bad.finish_reason == "failed"
    assert bad.truncated
    assert bad.conversation.failure == Failure(kind, "broken")
    assert (bad.conversation.home, bad.conversation.outcome) == (None, None)
    assert [seat.released for seat in host.all] == [0, 1, 0]
    tokens = {"reset": 0, "tool": 3, "step": 2, "reward": 8}[where]
    assert bad.token_ids == good.token_ids[:tokens]
    assert len(bad.conversation.turn_rewards) == (2 if where == "reward" else bool(tokens))


def test_a_failure_changes_nothing_that_the_others_draw(monkeypatch) -> None:
    """Rows draw by their place, a failed one's is left out; and where all fail, nothing is drawn."""
    from generation.ways import STOPS, generator_of

    def rows(*failing: int) -> list[Trajectory]:
        host = Host(reset=lambda seat, *_: Reply("error") if seat.number in failing else None)
        conversations = Conversations({"": Table(host, Numbers(ends=STOPS))}, 0, 99)
        engine = RolloutEngine(generator_of("joined layers", 4), Sampling(1.0, 20), conversations)
        (group,) = engine.rollout([TASK], 3, 1.0, [5])
        assert group.task == TASK
        return [rollout.trajectory for rollout in group.rollouts]

    begun: list[Row] = []
    begin = Sampler.begin_after

    def begins(*given) -> tuple[Row, ...]:
        begun[:] = begin(*given)
        return tuple(begun)

    monkeypatch.setattr(Sampler, "begin_after", begins)
    expected = rows()
    assert len({row.token_ids for row in expected}) == 3
    assert [row.token_ids for row in rows(1)] == [expected[0].token_ids, (), expected[2].token_ids]
    assert begun[1].token_ids == []  # nor is it decoded for nobody
    nothing = rows(0, 1, 2)
    assert [row.state for row in begun] == ["released"] * 3
    assert {(row.token_ids, row.trained, row.finish_reason, row.text) for row in nothing} == {((), (), "failed", "")}


def test_what_reset_adds_is_shared_as_far_as_it_is_the_same() -> None:
    added = {0: " 22 23", 1: " 22 24 25", 2: " 22"}
    host = Host(reset=lambda seat, columns, seed: added[seat.number])
    script = {23: [30, END], 25: [31, 32, END], 22: [33, END]}
    group = play(host, script, n=3, most=2)
    assert group.task.prompt_ids == (11, 20, 21, 22)
    assert group.task.prompt == ASKED
    rows = [rollout.trajectory for rollout in group.rollouts]
    assert [row.token_ids for row in rows] == [(23, 30, 1), (24, 25, 31, 32), (33, 1)]
    assert [row.trained for row in rows] == [(False, True, True), (False, False, True, True), (True, True)]
    assert [row.text for row in rows] == ["30", "31 32", "33"]  # of the completion alone
    assert [row.finish_reason for row in rows] == ["stop", "length", "stop"]  # of 2 tokens: its own are no limit's
    assert [row.conversation.prompt[0]["content"] for row in rows] == ["20 21 22 23", "20 21 22 24 25", "20 21 22"]
    assert len({given for seat in host.all for what, _, given in seat.asked}) == 3  # seeds


def test_the_text_of_a_row_begins_after_its_prompt() -> None:
    """Of all its turns, with what was said between them."""
    host = Host(tool=lambda *_: "43", reset=lambda seat, *_: f" {22 + seat.number}")
    script = {22: [CALL, END], 23: [OTHER, END], 43: [32, END]}
    rows = [rollout.trajectory for rollout in play(host, script, n=2).rollouts]
    assert [row.token_ids for row in rows] == [(22, 60, 1, 9, 12, 43, 32, 1), (23, 61, 1, 9, 12, 43, 32, 1)]
    assert [row.text for row in rows] == ["60 1 9 12 43 32", "61 1 9 12 43 32"]


def test_a_group_whose_prompts_are_equal_shares_all_of_them() -> None:
    group = play(Host(reset=lambda *_: " 22"), {22: [33, END]}, n=2)
    assert group.task.prompt_ids == (11, 20, 21, 22)
    assert [rollout.trajectory.token_ids for rollout in group.rollouts] == [(33, 1)] * 2


def test_a_prompt_that_reset_makes_too_long_fails() -> None:
    host = Host(reset=lambda seat, *_: " 22" if seat.number else None)
    good, bad = (r.trajectory for r in play(host, {21: [33, END]}, n=2, longest=3).rollouts)
    assert (good.finish_reason, bad.finish_reason) == ("stop", "failed")
    assert bad.conversation.failure == Failure(
        "error", "the prompt has 4 tokens after reset, and data.max_prompt_length is 3"
    )


@pytest.mark.parametrize("what", ["prompt_ids", "suffix_ids"])
def test_what_a_template_refuses_fails_its_conversation(what: str) -> None:
    """An environment may say what it likes: the run goes on."""

    def refuses(*_):
        raise UserError("roles must alternate")

    host, chat = Host(tool=numbered, reset=lambda *_: " 22"), Numbers()
    setattr(chat, what, refuses)
    engine = RolloutEngine(Scripted({22: [CALL, END]}), Sampling(), Conversations({"": Table(host, chat)}, 0, 9))
    row = engine.rollout([TASK], 1, 1.0, [1])[0].rollouts[0].trajectory
    assert row.conversation.failure == Failure("error", "roles must alternate")
    assert (row.finish_reason, row.trained_tokens) == ("failed", 0 if what == "prompt_ids" else 2)
    assert host.all[0].released == 1


def test_a_row_is_freed_before_its_environment_is_asked_for_a_reward(monkeypatch) -> None:
    """Which may take its time."""
    seen, release = [], Sampler.release
    monkeypatch.setattr(Sampler, "release", lambda self, row: (seen.append("freed"), release(self, row)))
    one(Host(tool=numbered, reward=lambda seat: seen.append("asked") or 1.0))
    assert seen == ["freed", "asked"]


def test_prompts_that_begin_differently_are_refused() -> None:
    host = Host(reset=lambda seat, *_: [])
    chat = Numbers()
    firsts = iter([[5], [6]])
    chat.prompt_ids = lambda messages: next(firsts)
    engine = RolloutEngine(Scripted({}), Sampling(), Conversations({"": Table(host, chat)}, 0, 9))
    with pytest.raises(RunError, match="the prompts of a group begin with different tokens"):
        engine.rollout([TASK], 2, 1.0, [1])
    assert [seat.released for seat in host.all] == [1, 1]


class Twice:
    async def rollout(self, task, sampler):
        sampler.begin(task.prompt_ids, 1)
        return sampler.begin_after([task.prompt_ids])


def test_a_prompt_is_chosen_before_rows_begin() -> None:
    engine = RolloutEngine(Scripted({21: [END]}), Sampling(), Twice())
    with pytest.raises(RunError, match="environment Twice, row 4 of data: rows of this task were begun before, after"):
        engine.rollout([TASK], 1, 1.0, [1])


def test_seats_that_are_kept_are_the_conversation_s_home() -> None:
    host = Host(tool=numbered)
    told = one(host, keeps_seats=True).conversation
    assert told.home is host.all[0]
    assert not host.all[0].released


def test_seats_are_released_where_a_rollout_breaks_off() -> None:
    chat = Numbers()
    chat.parse = lambda ids: 1 / 0
    host, other = Host(), Host()
    tables = {"a": Table(host, chat, keeps_seats=True), "b": Table(other, Numbers(), keeps_seats=True)}
    tasks = [Task(i, ASKED, TASK.prompt_ids, {"environment": name}) for i, name in enumerate("ba")]
    engine = RolloutEngine(Scripted({21: [30, 31, END]}, 1), Sampling(), Conversations(tables, 0, 9))
    with pytest.raises(ZeroDivisionError):
        engine.rollout(tasks, 2, 1.0, [1, 2])
    assert [seat.released for seat in host.all] == [1, 1]


def test_a_row_s_environment_is_named_by_its_column() -> None:
    hosts = {"a": Host(tool=numbered), "b": Host("text", step=lambda *_: None)}
    tables = {name: Table(host, Numbers()) for name, host in hosts.items()}
    rows = [{"environment": name, "answer": "4"} for name in ("b", "a")]
    tasks = [Task(i, "20 21", (11, 20, 22 - i), columns) for i, columns in enumerate(rows)]
    script = {**SCRIPT, 22: [30, END]}
    engine = RolloutEngine(Scripted(script), Sampling(1.0, 40), Conversations(tables, 0, 99, system="12"))
    first, second = engine.rollout(tasks, 1, 1.0, [1, 2])
    assert first.rollouts[0].trajectory.finish_reason == "done"
    assert len(hosts["a"].all[0].asked) == 4
    prompt = second.rollouts[0].trajectory.conversation.prompt
    assert prompt == ({"role": "system", "content": "12"}, {"role": "user", "content": "20 21"})
    assert hosts["a"].all[0].asked[0][1] == {"prompt": "20 21", "answer": "4"}
    assert hosts["a"].all[0].group == 1
    wrong = Task(5, ASKED, TASK.prompt_ids, {"environment": "aa"})
    with pytest.raises(UserError, match=r"row 5 of data has 'aa' in the column 'environment', and there is a, b"):
        engine.rollout([wrong], 1, 1.0, [1])
    engine.environment.tables = {"": tables["a"]}
    engine.rollout([wrong], 1, 1.0, [1])
    assert hosts["a"].all[-1].asked[0][1] == {"prompt": ASKED, "environment": "aa"}


def test_what_is_added_to_a_prompt() -> None:
    text, blocks = [{"type": "text", "text": "a"}], [{"type": "image"}]
    assert with_added([{"role": "user", "content": "a"}], "b") == ({"role": "user", "content": "ab"},)
    assert with_added([{"role": "user", "content": "a"}], blocks)[0]["content"] == text + blocks
    assert with_added([{"role": "user", "content": blocks}], "a")[0]["content"] == blocks + text
    before = {"role": "system", "content": "s"}
    assert with_added([before, {"role": "user", "content": blocks}], blocks) == (
        before, {"role": "user", "content": blocks + blocks},
    )  # fmt: skip
    assert messages_of("x") == [{"role": "user", "content": "x"}]


def test_what_sequences_begin_with() -> None:
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == (1, 2)
    assert common_prefix([(1, 2)]) == (1, 2)
    assert common_prefix([(1,), (2,)]) == ()
