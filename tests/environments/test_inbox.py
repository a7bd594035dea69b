"""What other threads send to a job, and whether decoding waits for it."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from grpo.environments import scheduler
from grpo.environments.inbox import Inbox
from grpo.environments.scheduler import Scheduler


def reading(jobs: Scheduler, inbox: Inbox, seen: list, until: int = 3) -> None:
    async def reads() -> None:
        while len(seen) < until:
            seen.append(await inbox.next())

    jobs.start(reads())
    jobs.run()


def test_things_are_taken_in_the_order_in_which_they_came() -> None:
    jobs, seen = Scheduler(), []
    inbox: Inbox = Inbox(jobs)
    inbox.put("a")
    reading(jobs, inbox, seen)
    assert seen == ["a"]
    inbox.put("b")
    inbox.put("c")
    jobs.collect(wait=True)
    jobs.run()
    assert seen == ["a", "b", "c"]
    assert not jobs.waits_outside


def test_what_comes_from_another_thread_wakes_a_driver_that_waits() -> None:
    jobs, seen = Scheduler(), []
    inbox: Inbox = Inbox(jobs)
    reading(jobs, inbox, seen, until=1)
    threading.Timer(0.05, lambda: inbox.put("late")).start()
    while jobs.waits_outside:
        jobs.collect(wait=True)
        jobs.run()
    assert seen == ["late"]


def test_it_is_punctual_unless_it_is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as nothing of its own decodes, others are held up for it, and not when something does."""
    monkeypatch.setattr(scheduler, "GRACE", 60.0)
    jobs, seen = Scheduler(), []
    inbox: Inbox = Inbox(jobs)
    reading(jobs, inbox, seen)
    threading.Timer(0.05, lambda: inbox.put("quick")).start()
    jobs.collect()
    jobs.run()
    assert seen == ["quick"]
    inbox.patient = True  # while it waits already
    jobs.collect()  # or this would take a minute
    assert seen == ["quick"]
    patient: Inbox = Inbox(jobs)
    patient.patient = True  # before it does
    reading(jobs, patient, [])
    jobs.collect()
    other: Future = Future()
    threading.Timer(0.05, lambda: other.set_result("other")).start()

    async def waits() -> None:
        seen.append(await jobs.outside(other))

    jobs.start(waits())
    jobs.run()
    jobs.collect()  # for the other it waits
    jobs.run()
    assert seen == ["quick", "other"]


def test_a_patient_one_that_loses_its_patience_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "GRACE", 60.0)
    jobs, seen = Scheduler(), []
    inbox: Inbox = Inbox(jobs)
    inbox.patient = True
    reading(jobs, inbox, seen)
    jobs.collect()
    inbox.patient = False
    threading.Timer(0.05, lambda: inbox.put("quick")).start()
    jobs.collect()
    jobs.run()
    assert seen == ["quick"]


def test_time_in_which_nothing_decodes_and_nothing_has_come_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that agents may take a while to start: when the first asks, the others are still waited for."""
    monkeypatch.setattr(scheduler, "GRACE", 0.3)
    monkeypatch.setattr(scheduler, "SHARE", 0.0)
    jobs, seen = Scheduler(), []
    inboxes: list[Inbox] = [Inbox(jobs), Inbox(jobs)]
    for inbox in inboxes:
        reading(jobs, inbox, seen, until=2)
    threading.Timer(0.5, lambda: inboxes[1].put("first")).start()
    threading.Timer(0.55, lambda: inboxes[0].put("second")).start()
    jobs.collect(wait=True)
    jobs.run()
    assert seen == ["second", "first"]


def test_a_closed_one_says_what_was_left_and_takes_nothing() -> None:
    jobs = Scheduler()
    inbox: Inbox = Inbox(jobs)
    assert inbox.put("a")
    assert inbox.close() == ["a"]
    assert not inbox.put("b")
    assert inbox.close() == []
