"""Messages between a trainer and its workers: a length, then that many bytes. Uses only the standard library."""

from __future__ import annotations

import socket
import struct
import time

_LENGTH = struct.Struct("!Q")
LONGEST = 1 << 32
"""Most bytes of a message. A longer message can only be noise from a reward that wrote to a wrong descriptor."""


def send(channel: socket.socket, message: bytes, seconds: float | None = None) -> None:
    """Send a message. Raises TimeoutError after `seconds`, OSError if the other end is gone."""
    channel.settimeout(seconds)
    channel.sendall(_LENGTH.pack(len(message)) + message)


def receive(channel: socket.socket, seconds: float | None = None) -> bytes:
    """The next message. Raises TimeoutError after `seconds`, ConnectionError if the other end is gone."""
    deadline = None if seconds is None else time.monotonic() + seconds
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size, deadline))
    if length > LONGEST:
        raise ConnectionError(f"a message of {length} bytes")
    return _exactly(channel, length, deadline)


def _exactly(channel: socket.socket, count: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        channel.settimeout(left)
        part = channel.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("closed")
        parts += part
    return bytes(parts)
