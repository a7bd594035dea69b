"""TCP links between the processes of a run, in a ring: each process has one to the next and one to the one before.

They go where MLX's own ring goes, so that a cable which MLX needs is a cable that they need. Nothing but small lines
of JSON goes over them, and only after both sides have said the run's secret.
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
"""Seconds in which the links must be made: all processes are there when they begin."""
TRY = 2.0
"""Seconds for one address to answer."""
LONGEST = 2**20
"""Bytes of a line that are read or kept before the other side counts as gone."""


class Member(NamedTuple):
    """A process of the run, as all others know it: `machine` is equal where its process ids mean the same processes."""

    host: str
    pid: int
    machine: str
    addresses: tuple[str, ...]
    port: int
    secret: str


@dataclass(slots=True)
class Link:
    """One end of a line to the process `peer`. `heard` is when the other side last said anything."""

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
        """Whether the other side is on this machine."""
        with suppress(OSError):
            return bool(self.sock.getpeername()[0] == self.sock.getsockname()[0])
        return False

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, from any thread, without waiting: what does not go now goes with the next one."""
        with self._sends:
            self._out = (self._out + json.dumps(message).encode() + b"\n")[-LONGEST:]
            with suppress(OSError):  # reading says what is wrong
                self._out = self._out[self.sock.send(self._out) :]

    def read(self) -> list[dict[str, Any]]:
        """The messages that have come. Raises OSError where the other side has gone."""
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
    """Where this process can be reached by the one before it. `member` is what the others are to be told."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._listener = socket.create_server(("", 0))
        port = self._listener.getsockname()[1]
        host = socket.gethostname()
        self.member = Member(host, os.getpid(), machine(), addresses(rank), port, secrets.token_hex(16))

    def links(self, members: Sequence[Member]) -> tuple[list[Link], str | None]:
        """The links to the next process and from the one before; or none, and what went wrong."""
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        secret, until = members[0].secret, time.monotonic() + PATIENCE
        came: list[socket.socket] = []
        thread = threading.Thread(target=lambda: came.extend(self._accepted(before, secret, until)), daemon=True)
        thread.start()
        went = self._reached(members[after], secret, until)
        thread.join()
        self._listener.close()
        if came and went is not None:
            for sock in (*came, went):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setblocking(False)
            return [Link(after, went), Link(before, came[0])], None
        for sock in (*came, *([went] if went else [])):
            sock.close()
        if went is None:
            tried = ", ".join(members[after].addresses)
            return [], f"{members[after].host} does not answer at port {members[after].port} of {tried}"
        return [], f"{members[before].host} did not come"

    def _accepted(self, rank: int, secret: str, until: float) -> list[socket.socket]:
        """The connection of the process `rank`, as soon as it has said who it is; none if it does not come in time."""
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
        """A connection to a process, at the first of its addresses that knows the run."""
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
    """The first line that somebody says, of 100 bytes at most."""
    said = b""
    while not said.endswith(b"\n") and len(said) < 100 and (byte := sock.recv(1)):
        said += byte
    return said.decode().rstrip("\n")


def machine() -> str:
    """A name for the machine that no other has, nor a container on it with process ids of its own."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # there is no /proc on a Mac, nor are there such containers
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def ring_of(environment: Callable[[str], str | None] = os.environ.get) -> list[list[str]]:
    """The addresses, as `HOST:PORT`, of each process of MLX's ring; none where MLX connects them otherwise."""
    hosts = environment("MLX_HOSTFILE")
    try:
        return [list(map(str, node)) for node in json.loads(Path(hosts).read_text())] if hosts else []
    except (OSError, ValueError, TypeError):
        return []


def addresses(rank: int) -> tuple[str, ...]:
    """Where the process `rank`, which is this one, may be reached, the likeliest first."""
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
    """The address of this machine by which it would speak with another. (Nothing is sent.)"""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((server, 9))
        return [str(probe.getsockname()[0])]
    return []


def cut_ring() -> None:
    """Shut MLX's own connections of the ring: what waits for another process in MLX then raises at once.

    MLX has no call for that, and would wait for ever for a process that is stopped or cut off.
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
