"""How conversations begin, together or apart, what a failure ends, and when their seats are given back."""

from __future__ import annotations

import pytest
from environments.conversing import (
    ASKED,
    CALL,
    END,
    OTHER,
    SCRIPT,
    TASK,
    Host,
    Numbers,
    numbered,
    one,
    play,
)
from environments.scripted import Scripted

from grpo.environments.conversations import Conversations
from grpo.environments.openings import messages_of, with_added
from grpo.environments.play import Table
from grpo.environments.sampler import Sampler, common_prefix
from grpo.environments.seats import Reply
from grpo.errors import RunError, UserError
from grpo.generation.rows import Row
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Failure, Task, Trajectory

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
        "error", "the prompt has 4 tokens after reset, but data.max_prompt_length is 3"
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
    with pytest.raises(RunError, match="the prompts of a group must share at least their first token"):
        engine.rollout([TASK], 2, 1.0, [1])
    assert [seat.released for seat in host.all] == [1, 1]


class Twice:
    async def rollout(self, task, sampler):
        sampler.begin(task.prompt_ids, 1)
        return sampler.begin_after([task.prompt_ids])


def test_a_prompt_is_chosen_before_rows_begin() -> None:
    engine = RolloutEngine(Scripted({21: [END]}), Sampling(), Twice())
    with pytest.raises(RunError, match="environment Twice, row 4 of data: rows of this task have begun already, after"):
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
    with pytest.raises(UserError, match=r"row 5 of data has 'aa' in the column 'environment', but the recipe has a, b"):
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
