"""The server on a real socket, in a thread, and clients that write bytes as they like."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grpo.serving import server
from grpo.serving.app import application
from grpo.serving.guard import Guard
from grpo.serving.service import Service

PATH = "/v1/completions"


@dataclass(frozen=True)
class Listening:
    service: Service
    server: Any
    port: int
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, sent: bytes = b"", room: int | None = None) -> socket.socket:
        """A connection to which these bytes have been written; with so much `room` for what comes back."""
        made = socket.socket()
        if room is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        made.settimeout(10)
        made.connect(("127.0.0.1", self.port))
        if sent:
            made.sendall(sent)
        return made

    def answer(self, *sent: bytes) -> bytes:
        """All that comes back until the server hangs up, or a whole answer is there. Pieces are sent one by one."""
        with self.connect(sent[0]) as made:
            got = b""
            for piece in sent[1:]:
                got += received(made, wholes=1)
                made.sendall(piece)
            return got + received(made, wholes=0 if got else 1)

    def idle(self) -> bool:
        """Whether nothing is left of any client."""
        state = self.server.server_state
        return not (state.connections or state.tasks or self.service._turnstile.inside)


@contextmanager
def listening(
    service: Service, drain: float = 1.0, refuse: Callable[[], object] = lambda: None, key: str | None = None
) -> Iterator[Listening]:
    at = server.listening("127.0.0.1", 0)
    at.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made = server.made(application(service, Guard(key)), drain, refuse=refuse)
    thread = threading.Thread(target=made.run, args=([at],))
    port = at.getsockname()[1]
    thread.start()
    until(lambda: made.started)
    try:
        yield Listening(service, made, port, thread)
    finally:
        made.should_exit = True
        thread.join(30)
        at.close()
    assert not thread.is_alive()


def request(body: Any, path: str = PATH, more: str = "", length: int | None = None) -> bytes:
    """An HTTP request, with this Content-Length if it is not to be the body's."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(sent) if length is None else length}\r\n\r\n".encode() + sent


def received(made: socket.socket, wholes: int = 0) -> bytes:
    """What comes until so many whole answers are there, or until the server hangs up."""
    got = b""
    while not wholes or answers_in(got) < wholes:
        try:
            piece = made.recv(65536)
        except ConnectionError:
            return got
        if not piece:
            return got
        got += piece
    return got


def answers_in(got: bytes) -> int:
    """How many answers are whole."""
    found = 0
    while (end := got.find(b"\r\n\r\n")) >= 0:
        head, rest = got[:end].lower(), got[end + 4 :]
        length = re.search(rb"content-length: (\d+)", head)
        if head.startswith(b"http/1.1 100"):
            got, found = rest, found - 1
        elif length:
            if len(rest) < int(length[1]):
                break
            got = rest[int(length[1]) :]
        else:
            _, whole, got = (b"\r\n" + rest).partition(b"\r\n0\r\n\r\n")
            if not whole:
                break
        found += 1
    return found


def statuses(got: bytes) -> list[int]:
    """The statuses of all answers in a row."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", got)]


def error_in(got: bytes) -> Any:
    """The error object that the last answer ends with."""
    return json.loads(got.rpartition(b"\r\n\r\n")[2])["error"]


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def open_files() -> int | None:
    """How many files this process has open; None where the system does not tell."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
