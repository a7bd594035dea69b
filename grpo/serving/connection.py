"""One client's connection, which can neither be held open for nothing nor break what the log says."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from grpo.serving.refusals import Refusal

KEEP_ALIVE = 30
"""Seconds that an idle connection is kept for the next request. Clients keep theirs for less (httpx: 5 seconds), or a
request might be sent into a connection that is being closed."""
HEAD_SECONDS = 60.0
"""Seconds from a connection's beginning, or the last answer, until the head of the next request must be there whole."""
READING_SECONDS = 30.0
"""Seconds in which a client must make room for more of an answer, or take the last of it."""
LINGER_SECONDS = 2.0
"""Seconds that a client has to read why the server hangs up."""
UNTOLD = 64
"""Connections beyond the most that are served which are told so; more are cut."""
MOST_AHEAD = 2**18
"""Bytes that a client may send ahead while a request of its is being answered."""


class LimitedConnection(H11Protocol):  # type: ignore[misc]
    """Uvicorn's connection, with these limits, and JSON for what is no HTTP.

    It goes on reading while a request is answered, also where the client has sent the next one already: or else nobody
    would see the client go.
    """

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._head: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._ahead, self._hung_up = 0, False
        super().connection_made(transport)
        self._watch()
        most = self.limit_concurrency
        if most is not None and len(self.connections) > most + UNTOLD:
            transport.abort()  # each takes a file descriptor

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for_head(False)
        self._limit_reading(False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._hung_up:
            return
        self._ahead = self._ahead + len(data) if self._answering and not self.cycle.more_body else 0
        super().data_received(data)
        if self._ahead > MOST_AHEAD:
            self.transport.abort()
        elif self._answering and self.conn.their_state is h11.DONE:
            self.flow.resume_reading()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()
        if self.transport.is_closing():
            self._limit_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._limit_reading(False)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._limit_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer has begun, and hang up."""
        del msg
        self._refuse(Refusal(400, "this is not a valid HTTP request", "invalid_http"))

    @property
    def _answering(self) -> bool:
        """Whether a request has come that has not been answered whole."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Let the client have its time for the next head: from now on, or from when it has had it."""
        self._wait_for_head(not (self._answering or self._hung_up or self.transport.is_closing()))

    def _wait_for_head(self, waits: bool) -> None:
        if waits and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._too_late)
        elif not waits and self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_late(self) -> None:
        said = f"no whole request came within {HEAD_SECONDS:g} seconds"
        self._refuse(Refusal(408, said, "timeout"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer so, if no answer has begun, and hang up.

        What the client still sends is let go by for a while: to close at once would take back the answer before it is
        read.
        """
        if self._answering:  # the request is not awaited any longer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(self._written(refusal))
        self._hung_up = True
        self._wait_for_head(False)
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except OSError:  # the client has gone already
            self.transport.abort()
        else:
            self._limit_reading(seconds=LINGER_SECONDS)

    def _written(self, refusal: Refusal) -> bytes:
        body = json.dumps(refusal.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        told: Any = [(name.encode(), value.encode()) for name, value in headers.items()]
        response = h11.Response(status_code=refusal.status, headers=told, reason=refusal.status.phrase.encode())
        parts = (response, h11.Data(data=body), h11.EndOfMessage())
        return b"".join(self.conn.send(part) or b"" for part in parts)

    def _limit_reading(self, limited: bool = True, seconds: float | None = None) -> None:
        if limited and self._reading is None:
            wait = READING_SECONDS if seconds is None else seconds
            self._reading = self.loop.call_later(wait, self.transport.abort)
        elif not limited and self._reading is not None:
            self._reading.cancel()
            self._reading = None
