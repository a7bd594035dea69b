"""Requests of agents on their way from the server's thread to the rollout's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from grpo.environments.inbox import Inbox
from grpo.environments.seats import Reply
from grpo.serving.asks import Ask, Ticket, Told
from grpo.serving.refusals import Refusal


@dataclass(frozen=True, slots=True)
class Posted:
    """A request."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody waits for the answer to a request any more."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Left:
    """The agent has returned, or failed."""

    reply: Reply


Mail = Posted | Cancelled | Left
"""What a session is sent."""


def session_over() -> Refusal:
    """The refusal of a request for which no rollout is under way."""
    return Refusal(404, "the session is over: its rollout has ended, and nothing is sampled any more", "session_over")


class TrainingDecoder:
    """A `Decoder` whose requests are decoded by the rollouts that they belong to. For any thread.

    What a session is told, it is told in the rollout's thread.
    """

    ended = False

    def __init__(self) -> None:
        self._lock = Lock()
        self._inboxes: dict[str, Inbox[Mail]] = {}

    def open(self, session: str, inbox: Inbox[Mail]) -> None:
        """Send the requests of a session there."""
        with self._lock:
            self._inboxes[session] = inbox

    def close(self, session: str) -> None:
        """Refuse the requests of a session from now on."""
        with self._lock:
            self._inboxes.pop(session, None)

    def submit(self, ask: Ask, tell: Callable[[Told], object]) -> Ticket:
        """Have a request answered. See `Decoder`."""
        ticket = Ticket(ask, tell)
        if not self._send(ask, Posted(ticket)):
            ticket.over = True
            tell(session_over())
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Answer a request no longer; nothing if it is over."""
        if not ticket.over:
            self._send(ticket.ask, Cancelled(ticket))

    def _send(self, ask: Ask, mail: Mail) -> bool:
        with self._lock:
            inbox = self._inboxes.get(ask.session or "")
        return inbox is not None and inbox.put(mail)
