"""One process in which seats live, as the trainer sees it: asked, waited for, given up, ended.

All of it happens on the event loop of its host, so nothing here needs a lock, and nothing may block.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any

from grpo.environments.seats import Reply
from grpo.errors import UserError

GRACE = 10.0
"""Seconds for a process to say that it has given up a call. One that does not answer is held by other people's code."""
CLOSED = Reply("crash", error="its process was ended, because the run is over")
HELD = "its process did not answer any more (a call in it holds all of it), so it was killed"


class LostError(Exception):
    """The process is gone, and the seats in it with it; `reply` says how."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.error)
        self.reply = reply


class Home:
    """Asks are made from the loop. Kinds of homes say how a request is sent and how all is ended.

    `hello` is what it has said of itself, once it is `ready`; `problem` why it could not be made ready.
    """

    holds_objects = False
    """Whether Python objects can be handed to it as they are, because it is in this process."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.hello: Mapping[str, Any] = {}
        self.problem: str | None = None
        self.gone = False
        """Whether nothing answers here any more. How it ended takes a while to find out: then all seats are lost."""
        self.lost: Reply | None = None
        self.retired = False
        """Whether it takes no new seats: something in it hangs."""
        self.seats: set[int] = set()
        self.office = asyncio.Lock()
        """Held by a call of a reward: one at a time, so that none waits within its time limit."""
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def ask(self, request: Mapping[str, Any], seconds: float) -> Any:
        """The answer. Raises TimeoutError after `seconds` from when it is ready, LostError if it ends before.

        If it is `gone` by then, this waits for `lose`, which says how it ended.
        """
        await self.ready.wait()
        if self.lost is not None:
            raise LostError(self.lost)
        number = next(self._numbers)
        self._waiting[number] = future = asyncio.get_running_loop().create_future()
        try:
            self.send({**request, "id": number})
            await asyncio.wait([future], timeout=seconds)
            if not future.done() and not self.gone:
                raise TimeoutError
            return await future
        finally:
            self._waiting.pop(number, None)

    async def administer(self, request: Mapping[str, Any], seconds: float) -> Any:
        """The answer to a request that is about no seat. Raises UserError for what its code could not do, too."""
        async with self.office:
            try:
                answer = await self.ask(request, seconds)
            except TimeoutError:
                await self.drop(None)
                raise
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["answer"]

    async def drop(self, seat: int | None) -> None:
        """Give up what a seat is at, or what a reward is (None).

        Where that cannot be ended, the others may finish, and then all is ended; where nothing answers, at once.
        """
        self.leave(seat)
        try:
            ended = (await self.ask({"op": "drop", "seat": seat}, GRACE))["ended"]
        except TimeoutError:
            await self.end(Reply("crash", error=HELD))
            return
        except LostError:
            return
        if not ended:
            self.retired = True
            self.leave(None)

    def leave(self, seat: int | None) -> None:
        """A seat is over. The last one to leave a retired home ends it."""
        self.seats -= {seat}
        if self.retired and not self.seats and not self.gone:
            self._ending = asyncio.ensure_future(self.end(CLOSED))

    def release(self, seat: int) -> None:
        """A conversation is over: its objects may serve another one."""
        if seat in self.seats and self.lost is None and self.ready.is_set():
            self.send({"op": "release", "seat": seat})
        self.leave(seat)

    def lose(self, reply: Reply) -> None:
        """All seats are lost, and whoever waits is told."""
        self.gone = True
        self.lost = self.lost or reply
        self.ready.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LostError(self.lost))
        self._waiting.clear()
        self.seats.clear()

    def answered(self, answer: Any) -> None:
        """An answer has come. Raises KeyError, TypeError and ValueError for what is none."""
        future = self._waiting.get(answer["id"])
        if "kind" in answer:
            answer = _reply(answer)
        if future is not None and not future.done():
            future.set_result(answer)

    def pack(self, columns: Mapping[str, Any]) -> bytes | Mapping[str, Any]:
        """A row as it is sent. Called from any thread; raises whatever its values raise."""
        raise NotImplementedError

    def send(self, request: Mapping[str, Any]) -> None:
        raise NotImplementedError

    async def end(self, reply: Reply) -> None:
        """End everything in it, and what that has started; all seats get this reply."""
        raise NotImplementedError


def _reply(answer: Mapping[str, Any]) -> Reply:
    """A reply, read as one that anything may have been written into."""
    kind, value, reward = answer["kind"], answer["value"], answer["reward"]
    if kind not in ("ok", "error") or not isinstance(value, None | str | list | float):
        raise ValueError("no reply")
    return Reply(kind, value, None if reward is None else float(reward), bool(answer["done"]), str(answer["error"]))
