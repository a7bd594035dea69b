"""The HTTP server around the application: its socket, and its shutdown."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from grpo.errors import UserError
from grpo.serving.connection import KEEP_ALIVE, LimitedConnection

CONNECTIONS = 1024
"""Number of connections that are served simultaneously; more are refused (503)."""
LEFT_SECONDS = 3.0
"""Seconds that clients have to read refusals when the server shuts down."""


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at this address. Raises UserError if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "ports are from 0 to 65535"
        raise UserError(f"cannot listen at {host}:{port}: {why}; choose another --port or --host") from None


def url_of(at: socket.socket) -> str:
    """The base URL of a socket, for clients."""
    host, port = at.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def run(app: Any, at: socket.socket, drain: float, refuse: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM. Then accept no more connections, and wait up to `drain` seconds for requests in
    progress; after that, `refuse` must refuse them. A second SIGINT ends the wait."""
    server = made(app, drain, refuse=refuse)
    with _asked_to_end(server):
        server.run(sockets=[at])


def made(
    app: Any, drain: float, connections: int | None = CONNECTIONS, refuse: Callable[[], object] = lambda: None
) -> Server:
    """The server of an application, with at most this many `connections`; see `run`. It can run in any thread, until
    its `should_exit` is set."""
    _make_room()
    config = uvicorn.Config(
        app,
        http=LimitedConnection,
        lifespan="on",
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=connections,
        timeout_keep_alive=KEEP_ALIVE,
    )
    config.load()
    return Server(config, drain, refuse)


class Server(uvicorn.Server):  # type: ignore[misc]
    """Uvicorn's server with a clean shutdown: waiting clients are refused, and clients that do not read are cut off."""

    def __init__(self, config: uvicorn.Config, drain: float, refuse: Callable[[], object]) -> None:
        super().__init__(config)
        self._drain, self._refuse = drain, refuse

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        ends = [loop.call_later(self._drain, self._refuse), loop.call_later(self._drain + LEFT_SECONDS, self._leave)]
        await super().shutdown(sockets)  # waits for all requests, or for a second SIGINT
        for end in ends:
            end.cancel()
        self._leave()
        if self.server_state.tasks:  # they end now, because their clients are disconnected
            await asyncio.wait(self.server_state.tasks, timeout=LEFT_SECONDS)
        if self.force_exit:  # otherwise the application would be canceled, with a traceback in the log
            await self.lifespan.shutdown()

    def _leave(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _make_room() -> None:
    """Raise this process's limit on open files to allow for all connections, as far as the system permits: some systems
    start with a limit of 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS if hard == resource.RLIM_INFINITY else min(2 * CONNECTIONS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _asked_to_end(server: Any) -> Iterator[None]:
    """Handle the signals that uvicorn raises again after its shutdown: they would end the process before it has cleaned
    up. Here they only set `should_exit`, which is already set."""

    def ask(*_: Any) -> None:
        server.should_exit = True

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
