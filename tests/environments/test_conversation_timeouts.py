"""A conversation that has had its time: while it decodes, while a call is under way, and while it waits for a slot."""

from __future__ import annotations

from concurrent.futures import Future
from itertools import count
from threading import Timer
from types import SimpleNamespace

import mlx.core as mx
import pytest
from environments.conversing import Host, Numbers, at_once
from environments.scripted import Scripted

from grpo.environments import play, scheduler
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.scheduler import Gate, Scheduler, TimeIsUpError
from grpo.environments.seats import ConversationLimits, Reply
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Task, Trajectory

TASK = Task(0, "20 21", (11, 20, 21), {})
LONG = [30] * 200


@pytest.fixture
def ticking(monkeypatch) -> None:
    """A clock that goes on by a second whenever somebody looks."""
    clock = SimpleNamespace(monotonic=count().__next__)
    monkeypatch.setattr(play, "time", clock)
    monkeypatch.setattr(scheduler, "time", clock)


def played(host: Host, script: dict, seconds: float, slots: int = 64, n: int = 1, most: int = 300) -> list[Trajectory]:
    conversations = Conversations({"": Table(host, Numbers(), ConversationLimits(rollout_timeout=seconds))}, 0, 99)
    (group,) = RolloutEngine(Scripted(script, slots), Sampling(1.0, most), conversations).rollout(
        [TASK], n, 1.0, mx.random.key(0)
    )
    return [rollout.trajectory for rollout in group.rollouts]


@pytest.mark.usefixtures("ticking")
def test_a_row_that_decodes_is_ended_with_what_it_has() -> None:
    host = Host(tool=lambda *_: "42", reward=lambda seat: 3.0)
    (row,) = played(host, {21: [60, 1], 42: LONG}, 20)
    assert row.finish_reason == "rollout_timeout"
    assert row.truncated
    assert row.token_ids[:5] == (60, 1, 9, 12, 42)
    assert 5 < len(row.token_ids) < 30
    assert set(row.token_ids[5:]) == {30}
    assert row.trained == (True, True, False, False, False, *[True] * (len(row.token_ids) - 5))
    assert [message["role"] for message in row.conversation.messages] == ["assistant", "tool", "assistant"]
    assert (row.conversation.turn_rewards, row.conversation.outcome) == ((None, None), 3.0)
    assert host.all[0].released == 1


@pytest.mark.usefixtures("ticking")
def test_its_environment_may_take_time_for_its_reward() -> None:
    """That is limited by the call's own time."""

    def run(function, seat, *given):
        if given or seat.asked[-1][0] != "reward":
            return at_once(function, seat, *given)
        future: Future = Future()
        Timer(0.02, future.set_result, [Reply(value=3.0)]).start()
        return future

    (row,) = played(Host(run=run, reward=lambda seat: 3.0), {21: LONG}, 20)
    assert (row.finish_reason, row.conversation.outcome) == ("rollout_timeout", 3.0)


@pytest.mark.usefixtures("ticking")
def test_a_row_that_waits_for_a_slot_is_ended_without_a_token() -> None:
    host = Host()
    first, second = played(host, {21: LONG}, 40, slots=1, n=2)
    assert first.finish_reason == second.finish_reason == "rollout_timeout"
    assert len(first.token_ids) > 10
    assert (second.token_ids, second.text, second.conversation.messages) == ((), "", ())
    assert second.conversation.turn_rewards == ()


class Impatient:
    async def rollout(self, task, sampler):
        (row,) = sampler.begin(task.prompt_ids, 1, keep=True)
        self.ended = await sampler.turn(row, until=0.0), row.state, dict(sampler._driver._ends)
        return [await sampler.ended(row)]


def test_a_row_is_released_as_soon_as_its_time_is_up() -> None:
    environment = Impatient()
    RolloutEngine(Scripted({21: LONG}), Sampling(1.0, 300), environment).rollout([TASK], 1, 1.0, [0])
    assert environment.ended == ("rollout_timeout", "released", {})


def test_a_call_that_is_under_way_is_not_waited_for() -> None:
    """Nor is the environment asked for its reward, which could come after the call alone."""

    def run(function, seat, *given):
        return Future() if given and given[0] == "t60" else at_once(function, seat, *given)

    host = Host(run=run, reward=lambda seat: 3.0)
    (row,) = played(host, {21: [60, 1]}, 0.02)
    assert (row.finish_reason, row.token_ids) == ("rollout_timeout", (60, 1))
    assert (row.conversation.outcome, row.conversation.failure) == (None, None)
    assert [what for what, *_ in host.all[0].asked] == ["reset", "tool"]
    assert host.all[0].released == 1


def test_a_row_with_time_enough_knows_of_no_limit() -> None:
    limited, free = (
        played(Host(tool=lambda *_: "42"), {21: [60, 1], 42: [31, 1]}, seconds) for seconds in (1e6, 86400)
    )
    assert [row.token_ids for row in limited] == [row.token_ids for row in free] == [(60, 1, 9, 12, 42, 31, 1)]


def test_work_outside_is_waited_for_until_a_moment() -> None:
    jobs, late, seen = Scheduler(), Future(), []

    async def waits(future: Future, until: float | None) -> None:
        try:
            seen.append(await jobs.outside(future, until))
        except TimeIsUpError:
            seen.append("too late")

    jobs.start(waits(late, 0.0))
    jobs.start(waits(other := Future(), None))
    jobs.run()
    jobs.collect(wait=True)  # not for ever
    jobs.ring()
    jobs.run()
    assert (seen, jobs.waits_outside) == (["too late"], True)
    late.set_result("late")  # which nobody waits for any more
    other.set_result("other")
    jobs.collect(wait=True)
    jobs.run()
    assert seen == ["too late", "other"]
    assert not jobs.waits_outside


def test_a_moment_opens_a_gate_once() -> None:
    jobs, gates, seen = Scheduler(), [Gate(), Gate()], []

    async def waits(number: int) -> None:
        await gates[number]
        seen.append(number)

    for number, moment in enumerate((0.0, 1e12)):
        jobs.start(waits(number))
        jobs.open_at(moment, gates[number])
    jobs.run()
    jobs.ring()
    jobs.run()
    assert seen == [0]
    jobs.open(gates[1])
    jobs.ring()
    jobs.run()
    assert seen == [0, 1]
