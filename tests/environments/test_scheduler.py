"""Coroutines that take turns: in order, side by side, and with work in other threads."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from grpo.environments import scheduler
from grpo.environments.mistakes import EnvironmentMistake
from grpo.environments.scheduler import Gate, Scheduler


def test_coroutines_go_on_in_the_order_in_which_their_gates_open() -> None:
    jobs, gates, seen = Scheduler(), [Gate(), Gate(), Gate()], []

    async def one(number: int) -> int:
        await gates[number]
        seen.append(number)
        return 10 * number

    started = [jobs.start(one(number)) for number in range(3)]
    jobs.run()
    assert seen == []
    for number in (2, 0):
        jobs.open(gates[number])
    jobs.run()
    assert seen == [2, 0]
    assert [started[number].result() for number in (2, 0)] == [20, 0]
    with pytest.raises(EnvironmentMistake, match="waits for a row that does not decode"):
        started[1].result()


def test_a_gate_that_is_open_holds_nobody_up() -> None:
    jobs, gate = Scheduler(), Gate()
    jobs.open(gate)

    async def passes() -> str:
        await gate
        return "through"

    job = jobs.start(passes())
    jobs.run()
    assert job.result() == "through"


def test_gathered_results_are_in_order_whoever_ends_first() -> None:
    jobs, gates = Scheduler(), [Gate(), Gate()]

    async def child(number: int) -> int:
        await gates[number]
        return number

    async def parent() -> list[int]:
        return await jobs.gather(child(number) for number in range(2))

    job = jobs.start(parent())
    for number in (1, 0):
        jobs.run()
        jobs.open(gates[number])
    jobs.run()
    assert job.result() == [0, 1]


def test_a_parent_may_catch_what_its_children_raise() -> None:
    jobs, gate, said = Scheduler(), Gate(), []

    async def child(wrong: bool) -> None:
        if wrong:
            raise ValueError("mine")
        await gate

    async def parent() -> None:
        try:
            await jobs.gather([child(False), child(True)])
        except ValueError as error:
            said.append(str(error))

    jobs.start(parent())
    jobs.run()
    jobs.open(gate)
    jobs.run()
    assert said == ["mine"]


def test_an_error_that_nobody_awaits_comes_at_once() -> None:
    jobs, never, ended = Scheduler(), Gate(), []

    async def waits() -> None:
        try:
            await never
        finally:
            ended.append("waits")

    async def breaks() -> None:
        raise ValueError("at once")

    jobs.start(waits())
    jobs.start(breaks())
    with pytest.raises(ValueError, match="at once"):
        jobs.run()
    assert ended == []
    jobs.close()
    assert ended == ["waits"]


def test_an_interrupt_passes_through() -> None:
    jobs, seen = Scheduler(), []

    async def asks() -> None:
        try:
            raise KeyboardInterrupt
        except Exception:
            seen.append("caught")

    jobs.start(asks())
    with pytest.raises(KeyboardInterrupt):
        jobs.run()
    assert seen == []


def test_work_outside_is_waited_for_only_when_there_is_nothing_else() -> None:
    jobs, first, second, seen = Scheduler(), Future(), Future(), []

    async def waits(future: Future) -> None:
        seen.append(await jobs.outside(future))

    jobs.start(waits(first))
    jobs.start(waits(second))
    jobs.run()
    jobs.collect()  # nothing has come, and nobody waits
    assert (seen, jobs.waits_outside) == ([], True)
    second.set_result("second")
    jobs.collect(wait=True)
    jobs.run()
    assert seen == ["second"]
    first.set_result("first")
    jobs.collect()
    jobs.run()
    assert seen == ["second", "first"]
    assert not jobs.waits_outside


def beginning(*futures: Future) -> tuple[Scheduler, list]:
    jobs, seen = Scheduler(), []

    async def waits(future: Future) -> None:
        seen.append(await jobs.outside(future))

    for future in futures:
        jobs.start(waits(future))
    jobs.run()
    return jobs, seen


def test_quick_work_is_waited_for_and_goes_on_in_the_order_in_which_it_was_begun(monkeypatch) -> None:
    """Whichever is done first: rows that go on are decoded beside the same others in every run."""
    monkeypatch.setattr(scheduler, "GRACE", 60.0)
    first, second = Future(), Future()
    jobs, seen = beginning(first, second)
    second.set_result("second")
    threading.Timer(0.05, lambda: first.set_result("first")).start()
    jobs.collect()
    jobs.run()
    assert seen == ["first", "second"]


def test_slow_work_is_waited_for_once_and_then_holds_nobody_up(monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "GRACE", 0.01)
    monkeypatch.setattr(scheduler, "SHARE", 0.0)
    first, second = Future(), Future()
    jobs, seen = beginning(first, second)
    jobs.collect()  # takes the time that there is
    monkeypatch.setattr(scheduler, "GRACE", 3600.0)
    second.set_result("second")
    jobs.collect()
    jobs.run()
    assert seen == ["second"]


def test_asyncio_s_own_is_refused_with_the_way_out() -> None:
    jobs = Scheduler()
    job = jobs.start(asyncio.sleep(0))
    with pytest.raises(
        EnvironmentMistake, match=r"run code that needs asyncio, or takes time, in a thread.*sampler\.outside"
    ):
        jobs.run()
    assert job.error is not None


def test_a_refusal_is_raised_where_it_was_awaited() -> None:
    jobs, said = Scheduler(), []

    async def waits() -> str:
        try:
            await asyncio.sleep(0)
        except EnvironmentMistake as error:
            said.append(str(error))
        return "went on"

    job = jobs.start(waits())
    jobs.run()
    assert said
    assert job.result() == "went on"
