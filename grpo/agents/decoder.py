"""Passes agents' requests from the server's thread to the rollout's thread."""

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
    """A new request."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A request whose client no longer waits for the answer."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Left:
    """The agent has returned, or failed."""

    reply: Reply


Mail = Posted | Cancelled | Left
"""A message to a session."""


def session_over() -> Refusal:
    """Return the refusal of a request whose rollout has ended."""
    return Refusal(404, "the session is over: its rollout has ended, and the model answers no more", "session_over")


class TrainingDecoder:
    """A `Decoder` that passes each request to its rollout. Thread-safe.

    The callbacks of accepted requests run in the rollout's thread.
    """

    ended = False

    def __init__(self) -> None:
        self._lock = Lock()
        self._inboxes: dict[str, Inbox[Mail]] = {}

    def open(self, session: str, inbox: Inbox[Mail]) -> None:
        """Send the requests of a session to `inbox`."""
        with self._lock:
            self._inboxes[session] = inbox

    def close(self, session: str) -> None:
        """Refuse all further requests of a session."""
        with self._lock:
            self._inboxes.pop(session, None)

    def submit(self, ask: Ask, tell: Callable[[Told], object]) -> Ticket:
        """Submit a request. See `Decoder`."""
        ticket = Ticket(ask, tell)
        if not self._send(ask, Posted(ticket)):
            ticket.over = True
            tell(session_over())
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancel a request, unless it is over."""
        if not ticket.over:
            self._send(ticket.ask, Cancelled(ticket))

    def _send(self, ask: Ask, mail: Mail) -> bool:
        with self._lock:
            inbox = self._inboxes.get(ask.session or "")
        return inbox is not None and inbox.put(mail)
