"""A client's connection with time limits: clients cannot hold connections open idly, or write into the log."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from grpo.serving.refusals import Refusal

KEEP_ALIVE = 30
"""Seconds that an idle connection stays open for the next request. This is longer than clients keep theirs (httpx: 5
seconds), so that a client does not send a request into a connection that the server is closing."""
HEAD_SECONDS = 60.0
"""Seconds for the complete head of a request to arrive, from the start of the connection or the last response."""
READING_SECONDS = 30.0
"""Seconds in which a client must read enough for more of a response to be sent, or read the rest of it."""
LINGER_SECONDS = 2.0
"""Seconds that a client has to read the reason why the server closes the connection."""
UNTOLD = 64
"""Number of connections above the limit that get a refusal; any further connections are closed without a response."""
MOST_AHEAD = 2**18
"""Bytes that a client may send ahead while the server answers its request."""


class LimitedConnection(H11Protocol):  # type: ignore[misc]
    """Uvicorn's connection with these limits, and with a JSON response to invalid HTTP.

    It keeps reading while a request is being answered, even if the client has already sent the next request: otherwise
    the server would not notice that the client disconnects.
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
            transport.abort()  # each connection takes a file descriptor

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
        """Refuse invalid HTTP, unless a response has begun, and close the connection."""
        del msg
        self._refuse(Refusal(400, "this is not a valid HTTP request", "invalid_http"))

    @property
    def _answering(self) -> bool:
        """Whether a request has arrived whose response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """Run the time limit for the next request's head while the connection waits for one; stop it otherwise."""
        self._wait_for_head(not (self._answering or self._hung_up or self.transport.is_closing()))

    def _wait_for_head(self, waits: bool) -> None:
        if waits and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._too_late)
        elif not waits and self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_late(self) -> None:
        self._refuse(Refusal(408, f"no complete request arrived within {HEAD_SECONDS:g} seconds", "timeout"))

    def _refuse(self, refusal: Refusal) -> None:
        """Send the refusal, if no response has begun, and close the connection.

        What the client still sends is ignored for a while: closing immediately would discard the response before the
        client reads it.
        """
        if self._answering:  # end the request that is being answered
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(self._written(refusal))
        self._hung_up = True
        self._wait_for_head(False)
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except OSError:  # the client has already disconnected
            self.transport.abort()
        else:
            self._limit_reading(seconds=LINGER_SECONDS)

    def _written(self, refusal: Refusal) -> bytes:
        body = json.dumps(refusal.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        encoded: Any = [(name.encode(), value.encode()) for name, value in headers.items()]
        response = h11.Response(status_code=refusal.status, headers=encoded, reason=refusal.status.phrase.encode())
        parts = (response, h11.Data(data=body), h11.EndOfMessage())
        return b"".join(self.conn.send(part) or b"" for part in parts)

    def _limit_reading(self, limited: bool = True, seconds: float | None = None) -> None:
        if limited and self._reading is None:
            wait = READING_SECONDS if seconds is None else seconds
            self._reading = self.loop.call_later(wait, self.transport.abort)
        elif not limited and self._reading is not None:
            self._reading.cancel()
            self._reading = None
