"""A home in a worker process, which is ended together with all processes that it has started."""

from __future__ import annotations

import asyncio
import json
import pickle
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.environments.home import Home
from grpo.environments.seats import Reply
from grpo.processes.channel import LONGEST
from grpo.processes.child import ChildProcess
from grpo.processes.endings import ended, killed
from grpo.processes.output import Output
from grpo.processes.sandbox.worker import Sandbox

SCRIPT = Path(__file__).with_name("worker.py")
START_SECONDS = 120.0
"""Time limit for starting a process: environment files may import large libraries, but not hang."""

_LENGTH = struct.Struct("!Q")
_NOISE = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
"""Errors of a process that is gone, and of parsing a message into which user code may have written anything."""


@dataclass(frozen=True, slots=True)
class ProcessTerms:
    """How to start a process.

    setup      the first message, pickled
    variables  its environment variables
    memory_gb  its memory limit in GB; None: no limit
    sandbox    the sandbox in which it runs, if any
    agents     whether it runs agents
    """

    setup: bytes
    variables: Mapping[str, str]
    memory_gb: float | None = None
    sandbox: Sandbox | None = None
    agents: bool = False

    def start(self, output: Output) -> ChildProcess:
        return ChildProcess(SCRIPT, output, self.variables, self.memory_gb, self.sandbox)


class ProcessHome(Home):
    """Starts its process immediately, and does not wait for it."""

    def __init__(self, terms: ProcessTerms, output: Output) -> None:
        super().__init__()
        self._terms, self._output = terms, output
        self._writer: asyncio.StreamWriter | None = None
        self._process: ChildProcess | None = None
        try:
            self._process = terms.start(output)
        except OSError as error:  # too many processes or descriptors on this machine: lose the seats, not the run
            self.problem = f"its process cannot be started: {error}"
            self.lose(Reply("crash", error=self.problem))
            return
        self._reading = asyncio.ensure_future(self._read(self._process))

    def pack(self, columns: Mapping[str, Any]) -> bytes:
        return pickle.dumps(dict(columns))

    def send(self, request: Mapping[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            message = pickle.dumps(request)
            self._writer.write(_LENGTH.pack(len(message)) + message)

    async def end(self, reply: Reply) -> None:
        self.lose(reply)
        if self._process is None:
            return
        self._reading.cancel()
        self._disconnect()
        await asyncio.to_thread(self._process.kill)

    async def _read(self, process: ChildProcess) -> None:
        """Read the process's messages until it ends; then report how it ended."""
        when = "when imported"
        try:
            reader, self._writer = await asyncio.open_connection(sock=process.channel)
            self._writer.write(_LENGTH.pack(len(self._terms.setup)) + self._terms.setup)
            async with asyncio.timeout(START_SECONDS):
                self.hello = await _receive(reader)
            if "error" in self.hello:
                self.problem = str(self.hello["error"])
                await self._over(process, Reply("crash", error=self.problem))
                return
            self.ready.set()
            when = "while agents ran in it" if self._terms.agents else "in a call"
            while True:
                self.answered(await _receive(reader))
        except TimeoutError:  # before `_NOISE`, because TimeoutError is an OSError
            self._disconnect()
            self.problem = await asyncio.to_thread(killed, process, START_SECONDS, when)
            await self._over(process, Reply("crash", error=self.problem))
        except _NOISE as error:
            if not threading.main_thread().is_alive():  # Python is exiting, which ended the process
                return
            self._disconnect()
            memory_gb = self._terms.memory_gb
            by_memory, said = await asyncio.to_thread(ended, process, self._output, error, when, memory_gb)
            self.problem = said
            await self._over(process, Reply("memory" if by_memory else "crash", error=said))

    async def _over(self, process: ChildProcess, reply: Reply) -> None:
        self.lose(reply)
        self._disconnect()
        await asyncio.to_thread(process.kill)

    def _disconnect(self) -> None:
        """Close the connection. Call this before killing the process: the kill closes a descriptor that the loop would
        otherwise still watch."""
        self.gone = True
        if self._writer is not None:
            self._writer.transport.abort()


async def _receive(reader: asyncio.StreamReader) -> Any:
    """Return the next message. Raises EOFError if the connection is closed."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(await reader.readexactly(length))
