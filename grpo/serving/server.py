"""The HTTP server around the application: where it listens, and how it ends."""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from grpo.errors import UserError

CONNECTIONS = 1024
"""Connections that are served at once; more are refused (503)."""


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


def run(app: Any, at: socket.socket, drain: float) -> None:
    """Serve until SIGINT or SIGTERM. Then no connection is taken any more, and requests under way have `drain` seconds
    to be answered. A second SIGINT ends it without that."""
    server = made(app, drain)
    with _asked_to_end(server):
        server.run(sockets=[at])


def made(app: Any, drain: float, connections: int | None = CONNECTIONS) -> Any:
    """Uvicorn's server of an application, with so many `connections` at most; see `run`. It can run in any thread,
    until its `should_exit` is set."""
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=math.ceil(drain),
    )
    config.load()
    return uvicorn.Server(config)


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
