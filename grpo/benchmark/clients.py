"""Clients of an endpoint, in a process without MLX. `grpo.benchmark.serving` starts it.

Each line of input is a JSON array of request bodies. The clients send all bodies simultaneously, each over its own
connection, which is already open. The output is a line of JSON: seconds until the last response, number of prompt
tokens, and number of sampled tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping, Sequence
from typing import Any

PATH = "/v1/chat/completions"
LONGEST = 2**26
"""Maximum number of bytes of a response."""

Connection = tuple[StreamReader, StreamWriter]


class Clients:
    """Connections to one server, kept open as long as the server allows."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._open: list[Connection] = []

    async def ask(self, bodies: Sequence[Any]) -> dict[str, float]:
        """Send all bodies simultaneously. Raises ValueError for an error response."""
        requests = [self._request(body) for body in bodies]
        self._open = [(reader, writer) for reader, writer in self._open if not (reader.at_eof() or writer.is_closing())]
        while len(self._open) < len(bodies):
            self._open.append(await asyncio.open_connection(self._host, self._port, limit=LONGEST))
        started = time.perf_counter()
        found = await asyncio.gather(*map(self._answer, self._open[: len(bodies)], requests))
        seconds = time.perf_counter() - started
        usages = [_usage(answer) for answer in found]
        prompts, sampled = (sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens"))
        return {"s": seconds, "prompt tokens": prompts, "tokens": sampled}

    async def close(self) -> None:
        """Close all connections."""
        for _, writer in self._open:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in self._open), return_exceptions=True)

    def _request(self, body: Any) -> bytes:
        encoded = json.dumps(body).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(encoded)}\r\n\r\n"
        )
        return head.encode() + encoded

    async def _answer(self, connection: Connection, request: bytes) -> bytes:
        """The body of the response."""
        reader, writer = connection
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status, *lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        length, chunked = headers.get("content-length"), headers.get("transfer-encoding") == "chunked"
        if length is not None:
            body = await reader.readexactly(int(length))
        else:
            body = await reader.readuntil(b"\r\n0\r\n\r\n") if chunked else await reader.read()
        if status.startswith("http/1.0") or headers.get("connection") == "close":
            writer.close()
        if status.split()[1] != "200":
            raise ValueError(f"the server answered {status}: {body[:500]!r}")
        return body


def _usage(answer: bytes) -> Mapping[str, int]:
    """The usage in a response; a stream has it in its last event."""
    if not answer.startswith(b"{"):
        answer = next(line for line in reversed(answer.split(b"data: ")) if b'"usage"' in line).split(b"\n")[0]
    usage: Mapping[str, int] = json.loads(answer)["usage"]
    return usage


async def _run(clients: Clients) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await clients.ask(json.loads(line))), flush=True)


def main() -> None:
    """Print one line of measurements for each line of bodies."""
    try:
        asyncio.run(_run(Clients(sys.argv[1], int(sys.argv[2]))))
    except (OSError, EOFError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
