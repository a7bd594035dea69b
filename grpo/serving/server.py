"""The HTTP server around the application: where it listens, and how it ends."""

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
"""Connections that are served at once; more are refused (503)."""
LEFT_SECONDS = 3.0
"""Seconds for refusals to be read, when the server ends."""


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "ports are from 0 to 65535"
        raise UserError(f"cannot listen at {host}:{port}: {why}; --port and --host name another place") from None


def url_of(at: socket.socket) -> str:
    """What clients call a socket's place."""
    host, port = at.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def run(app: Any, at: socket.socket, drain: float, refuse: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM. Then no connection is taken any more, and requests under way have `drain` seconds
    to be answered, until `refuse` is called, which refuses them. A second SIGINT ends it without that."""
    server = made(app, drain, refuse=refuse)
    with _asked_to_end(server):
        server.run(sockets=[at])


def made(
    app: Any, drain: float, connections: int | None = CONNECTIONS, refuse: Callable[[], object] = lambda: None
) -> Server:
    """The server of an application, with so many `connections` at most; see `run`. It can run in any thread, until its
    `should_exit` is set."""
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
    """Uvicorn's server, which ends quietly: who waits is refused, and who is slow even then is left."""

    def __init__(self, config: uvicorn.Config, drain: float, refuse: Callable[[], object]) -> None:
        super().__init__(config)
        self._drain, self._refuse = drain, refuse

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        ends = [loop.call_later(self._drain, self._refuse), loop.call_later(self._drain + LEFT_SECONDS, self._leave)]
        await super().shutdown(sockets)  # which waits for all requests, or for a second SIGINT
        for end in ends:
            end.cancel()
        self._leave()
        if self.server_state.tasks:  # which see now that nobody waits for them
            await asyncio.wait(self.server_state.tasks, timeout=LEFT_SECONDS)
        if self.force_exit:  # or else the application would be cancelled, with a traceback in the log
            await self.lifespan.shutdown()

    def _leave(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _make_room() -> None:
    """Let this process have as many files open as there can be connections, where the system allows it: some systems
    start with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS if hard == resource.RLIM_INFINITY else min(2 * CONNECTIONS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _asked_to_end(server: Any) -> Iterator[None]:
    """Uvicorn raises the signals again that it has obeyed, which would end the process before it has cleaned up. Here
    they ask once more for what has been done."""

    def ask(*_: Any) -> None:
        server.should_exit = True

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
