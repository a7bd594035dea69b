"""A session without a server or a model: what is left when its agent has gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from grpo.agents.decoder import Cancelled, Left, Posted, TrainingDecoder
from grpo.agents.session import AgentSession, Room
from grpo.environments.inbox import Inbox
from grpo.environments.scheduler import Scheduler
from grpo.environments.seats import ConversationLimits, Reply
from grpo.generation.sampling import Sampling
from grpo.serving.asks import Ask, Ticket

ASK = Ask("policy", (1, 2), Sampling(), 1, 0, False, session="one")


def opened() -> tuple[Scheduler, AgentSession]:
    jobs = Scheduler()
    sampler: Any = SimpleNamespace(inbox=lambda: Inbox(jobs))
    return jobs, AgentSession(sampler, 0, Room(9, ConversationLimits()))


def test_what_comes_when_the_agent_has_gone_is_refused() -> None:
    jobs, session = opened()
    told: list[Any] = []
    tickets = [Ticket(ASK, told.append) for _ in range(2)]
    session.inbox.put(Left(Reply(value="{}")))
    for mail in (Posted(tickets[0]), Cancelled(tickets[1])):
        session.inbox.put(mail)
    job = jobs.start(session.until_it_leaves())
    jobs.run()
    assert job.result() == Reply(value="{}")
    assert [(refusal.status, refusal.code) for refusal in told] == [(404, "session_over")]
    assert [ticket.over for ticket in tickets] == [True, False]


def test_a_decoder_refuses_for_sessions_that_are_not_open_and_for_those_that_have_closed() -> None:
    """At once, and in the thread that asks."""
    decoder, told, jobs = TrainingDecoder(), list[Any](), Scheduler()
    assert decoder.submit(ASK, told.append).over
    inbox: Inbox = Inbox(jobs)
    decoder.open("one", inbox)
    waiting = decoder.submit(ASK, told.append)
    decoder.cancel(waiting)
    assert inbox.close() == [Posted(waiting), Cancelled(waiting)]
    assert decoder.submit(ASK, told.append).over
    decoder.close("one")
    over = decoder.submit(ASK, told.append)
    decoder.cancel(over)
    assert [refusal.code for refusal in told] == ["session_over"] * 3
