"""TCP links between the processes of a run, in a ring: each process has a link to the next and to the previous process.

The links use the addresses of MLX's ring, so they fail with the same cables. They carry only short lines of JSON, after
both sides have exchanged the run's secret.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE = 10.0
"""Seconds to establish the links. All processes are already running by then."""
TRY = 2.0
"""Seconds that one address has to answer."""
LONGEST = 2**20
"""Most bytes of an unfinished line, and of unsent data. With a longer line the other side counts as gone."""


class Member(NamedTuple):
    """A process of the run, as known to all others. Process ids are comparable only between members with the same
    `machine`."""

    host: str
    pid: int
    machine: str
    addresses: tuple[str, ...]
    port: int
    secret: str


@dataclass(slots=True)
class Link:
    """One end of a connection to the process `peer`. `heard` is the time of the last message from the other side."""

    peer: int
    sock: socket.socket
    heard: float = field(default_factory=time.monotonic)
    closed: bool = False
    _in: bytes = b""
    _out: bytes = b""
    _sends: threading.Lock = field(default_factory=threading.Lock)

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def local(self) -> bool:
        """Whether the other end is on this machine."""
        with suppress(OSError):
            return bool(self.sock.getpeername()[0] == self.sock.getsockname()[0])
        return False

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, from any thread, without waiting. Unsent bytes go out with the next message."""
        with self._sends:
            self._out = (self._out + json.dumps(message).encode() + b"\n")[-LONGEST:]
            with suppress(OSError):  # `read` reports the error
                self._out = self._out[self.sock.send(self._out) :]

    def read(self) -> list[dict[str, Any]]:
        """The received messages. Raises OSError if the other side is gone."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return []
        if not data or len(self._in) > LONGEST:
            raise ConnectionResetError("the other side has closed the link")
        self.heard = time.monotonic()
        *lines, self._in = (self._in + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.closed = True
        self.sock.close()


class Door:
    """Listens for the connection from the previous process. `member` describes this process to the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._listener = socket.create_server(("", 0))
        port = self._listener.getsockname()[1]
        host = socket.gethostname()
        self.member = Member(host, os.getpid(), machine(), addresses(rank), port, secrets.token_hex(16))

    def links(self, members: Sequence[Member]) -> tuple[list[Link], str | None]:
        """The links to the next process and from the previous process; or no links, and the reason."""
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        secret, until = members[0].secret, time.monotonic() + PATIENCE
        incoming: list[socket.socket] = []
        thread = threading.Thread(target=lambda: incoming.extend(self._accepted(before, secret, until)), daemon=True)
        thread.start()
        outgoing = self._reached(members[after], secret, until)
        thread.join()
        self._listener.close()
        if incoming and outgoing is not None:
            for sock in (*incoming, outgoing):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setblocking(False)
            return [Link(after, outgoing), Link(before, incoming[0])], None
        for sock in (*incoming, *([outgoing] if outgoing else [])):
            sock.close()
        if outgoing is None:
            tried = ", ".join(members[after].addresses)
            return [], f"{members[after].host} does not answer on port {members[after].port} of {tried}"
        return [], f"{members[before].host} did not connect"

    def _accepted(self, rank: int, secret: str, until: float) -> list[socket.socket]:
        """The connection from the process `rank`, once it has identified itself; empty if it does not come in time."""
        while (left := until - time.monotonic()) > 0:
            self._listener.settimeout(left)
            with suppress(OSError, ValueError), ExitStack() as stack:
                sock = stack.enter_context(self._listener.accept()[0])
                sock.settimeout(TRY)
                if _line(sock) == f"{secret} {rank}":
                    sock.sendall(b"welcome\n")
                    stack.pop_all()
                    return [sock]
        return []

    def _reached(self, member: Member, secret: str, until: float) -> socket.socket | None:
        """A connection to a process, at its first address that answers with the run's handshake."""
        while time.monotonic() < until:
            for address in member.addresses:
                with suppress(OSError, ValueError), ExitStack() as stack:
                    sock = stack.enter_context(socket.create_connection((address, member.port), timeout=TRY))
                    sock.sendall(f"{secret} {self.rank}\n".encode())
                    if _line(sock) == "welcome":
                        stack.pop_all()
                        return sock
            time.sleep(0.1)
        return None


def _line(sock: socket.socket) -> str:
    """The first line from a socket, at most 100 bytes."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 100 and (byte := sock.recv(1)):
        line += byte
    return line.decode().rstrip("\n")


def machine() -> str:
    """A unique name for the machine, or for the container if it has its own process ids."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # macOS has neither /proc nor such containers
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def ring_of(environment: Callable[[str], str | None] = os.environ.get) -> list[list[str]]:
    """The addresses, as `HOST:PORT`, of each process of MLX's ring; empty with another backend of MLX."""
    hosts = environment("MLX_HOSTFILE")
    try:
        return [list(map(str, node)) for node in json.loads(Path(hosts).read_text())] if hosts else []
    except (OSError, ValueError, TypeError):
        return []


def addresses(rank: int) -> tuple[str, ...]:
    """The addresses at which this process, `rank`, may be reachable, the likeliest first."""
    ring, name = ring_of(), socket.gethostname()
    found = [address.rpartition(":")[0] for address in ring[rank]] if rank < len(ring) else []
    for variable in ("NCCL_HOST_IP", "MLX_JACCL_COORDINATOR"):
        if server := os.environ.get(variable):
            found += _towards(server.partition(":")[0])
    found += [name, f"{name}.local"]
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)]
    return tuple(dict.fromkeys(found))


def _towards(server: str) -> list[str]:
    """This machine's address on the route to a server. Sends nothing."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((server, 9))
        return [str(probe.getsockname()[0])]
    return []


def cut_ring() -> None:
    """Shut down the connections of MLX's ring, so that waits inside MLX raise immediately.

    MLX has no function for this, and would wait forever for a process that is stopped or disconnected.
    """
    ring = {address for node in ring_of() for address in node}
    for name in os.listdir("/dev/fd"):
        with suppress(OSError, ValueError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family != socket.AF_INET:
                    continue
                ends = (sock.getpeername(), sock.getsockname())
                if any(f"{end[0]}:{end[1]}" in ring for end in ends):
                    sock.shutdown(socket.SHUT_RDWR)
