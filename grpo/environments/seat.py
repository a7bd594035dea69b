"""A seat in a home: makes the calls of one conversation, one after another, each with its time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from grpo.environments.home import CLOSED, Home, LostError
from grpo.environments.results import of_exception
from grpo.environments.seats import Reply
from grpo.types import Message

if TYPE_CHECKING:
    from grpo.environments.host import EnvironmentHost


class HostSeat:
    """A `Seat`. Once it is lost, every later call gets the same reply."""

    def __init__(self, host: EnvironmentHost, home: Home, number: int) -> None:
        self.home, self.number = home, number
        self._host = host
        self._lost: Reply | None = None
        self._turn = asyncio.Lock()

    def reset(self, columns: Mapping[str, Any], seed: int) -> Future[Reply]:
        terms = self._host.terms
        given = {name: v for name, v in columns.items() if not (terms.several and name == "environment")}
        try:
            packed = self.home.pack(given)
        except Exception as error:  # a dataset value that cannot be pickled
            said = f"the row cannot be sent to the environment: {of_exception(error, False).error}"
            return self._host.submit(_given(Reply("error", error=said)), CLOSED)
        return self._ask("reset", {"columns": packed, "seed": seed}, terms.reset_timeout)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> Future[Reply]:
        given = {"name": tool, "arguments": dict(arguments)}
        what = "the agent" if self._host.terms.agent else repr(tool)
        return self._ask("call", given, self._host.seconds(tool), what)

    def step(self, message: Message) -> Future[Reply]:
        return self._ask("step", {"message": dict(message)}, self._host.terms.timeout)

    def reward(self) -> Future[Reply]:
        return self._ask("reward", {}, self._host.terms.timeout, "get_reward")

    def release(self) -> None:
        self._host.submit(self._released(), None)

    def _ask(self, op: str, arguments: Mapping[str, Any], seconds: float, what: str | None = None) -> Future[Reply]:
        return self._host.submit(self._shielded(op, arguments, seconds, what or op), CLOSED)

    async def _shielded(self, op: str, arguments: Mapping[str, Any], seconds: float, what: str) -> Reply:
        """Return the reply. Canceling the future does not cancel the seat's call."""
        return await asyncio.shield(asyncio.ensure_future(self._asked(op, arguments, seconds, what)))

    async def _asked(self, op: str, arguments: Mapping[str, Any], seconds: float, what: str) -> Reply:
        async with self._turn:
            if self._lost is not None:
                return self._lost
            try:
                reply: Reply = await self.home.ask({"op": op, "seat": self.number, "arguments": arguments}, seconds)
            except TimeoutError:
                said = f"{what} gave no answer in {seconds:g} s{self._host.terms.late}"
                self._lost = Reply("timeout", error=said)
                self._dropping = asyncio.ensure_future(self.home.drop(self.number))
            except LostError as error:
                self._lost = error.reply
            except Exception as error:  # arguments that cannot be sent
                return of_exception(error, op == "call")
            return self._lost or self._explained(reply, op)

    def _explained(self, reply: Reply, op: str) -> Reply:
        """Return the reply, with a hint in errors that people read. The errors of tools are for the model."""
        if reply.kind != "error" or (op == "call" and not self._host.terms.agent):
            return reply
        return Reply("error", error=self._host.terms.explain(reply.error))

    async def _released(self) -> None:
        async with self._turn:
            self.home.release(self.number)


async def _given(reply: Reply) -> Reply:
    return reply
