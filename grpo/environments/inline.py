"""A home in the trainer's own process, for classes and functions that were passed from Python as objects.

Calls have time limits here too. But a call that hangs cannot be ended (its thread is abandoned), and a crash ends the
trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from grpo.environments.chairs import Chairs
from grpo.environments.home import Home
from grpo.environments.seats import Reply
from grpo.environments.streams import install
from grpo.environments.toolbox import Makers
from grpo.errors import UserError


class InlineHome(Home):
    """Starts to create the first objects immediately, in a thread."""

    holds_objects = True

    def __init__(self, makers: Makers, name: str | None) -> None:
        super().__init__()
        install()
        self._loop = asyncio.get_running_loop()
        self._chairs = Chairs(makers, self._answer)
        self._starting = asyncio.ensure_future(self._start(name))

    def pack(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        return dict(columns)

    def send(self, request: Mapping[str, Any]) -> None:
        self._chairs.handle(request)

    async def end(self, reply: Reply) -> None:
        self.lose(reply)
        self._starting.cancel()
        self._chairs.close()

    async def _start(self, name: str | None) -> None:
        try:
            self.hello = await asyncio.to_thread(self._chairs.hello, name)
        except Exception as error:  # inspecting user objects may raise anything
            self.problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.lose(Reply("crash", error=self.problem))
        self.ready.set()

    def _answer(self, answer: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the host was closed while this call ran
            self._loop.call_soon_threadsafe(self.answered, answer)
