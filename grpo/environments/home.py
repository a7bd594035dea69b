"""The trainer's side of one process with seats: requests, replies, time limits, and its end.

All of this code runs on the event loop of the process's host: it needs no locks, and must not block.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any

from grpo.environments.seats import Reply
from grpo.errors import UserError

GRACE = 10.0
"""Seconds in which a process must confirm that it has given up a call. If it does not, user code blocks all of it."""
CLOSED = Reply("crash", error="its process was ended because the run is over")
HELD = "its process stopped answering (one of its calls blocks the whole process), so it was killed"


class LostError(Exception):
    """The process is gone with all of its seats; `reply` says how it ended."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.error)
        self.reply = reply


class Home:
    """Base class of homes. Subclasses implement how to send a request and how to end the home.

    `hello` is the home's description of itself, once it is `ready`; `problem` is why it could not become ready. Call
    the methods on the host's event loop, except for `pack`.
    """

    holds_objects = False
    """Whether it takes Python objects without pickling, because it lives in the trainer's process."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.hello: Mapping[str, Any] = {}
        self.problem: str | None = None
        self.gone = False
        """Whether the home no longer answers. `lost` is set later, because it takes time to find out how it ended."""
        self.lost: Reply | None = None
        self.retired = False
        """Whether it takes no new seats, because a call in it hangs."""
        self.seats: set[int] = set()
        self.office = asyncio.Lock()
        """Held during a call of a reward. One call runs at a time, so that no time limit includes waiting."""
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def ask(self, request: Mapping[str, Any], seconds: float) -> Any:
        """Send a request and return the answer.

        Raises TimeoutError if there is no answer within `seconds`, counted from when the home is ready, and LostError
        if the home ends first. If the home is `gone` by then, this waits for `lose`, which gives the reason.
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
        """Return the answer to a request that concerns no single seat.

        Raises as `ask` does, and UserError if the user's code failed.
        """
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
        """Give up the call that a seat is making, or with None the call of a reward.

        If the call cannot be ended, the home retires: the other seats may finish, and then the home is ended. If the
        home does not answer, it is ended immediately.
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
        """Remove a seat. When the last seat leaves a retired home, the home is ended."""
        self.seats -= {seat}
        if self.retired and not self.seats and not self.gone:
            self._ending = asyncio.ensure_future(self.end(CLOSED))

    def release(self, seat: int) -> None:
        """End a seat's conversation: its objects may serve another conversation."""
        if seat in self.seats and self.lost is None and self.ready.is_set():
            self.send({"op": "release", "seat": seat})
        self.leave(seat)

    def lose(self, reply: Reply) -> None:
        """Mark all seats as lost, and raise LostError in everything that waits for an answer."""
        self.gone = True
        self.lost = self.lost or reply
        self.ready.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LostError(self.lost))
        self._waiting.clear()
        self.seats.clear()

    def answered(self, answer: Any) -> None:
        """Deliver an answer. Raises KeyError, TypeError, or ValueError if the message is not a valid answer."""
        future = self._waiting.get(answer["id"])
        if "kind" in answer:
            answer = _reply(answer)
        if future is not None and not future.done():
            future.set_result(answer)

    def pack(self, columns: Mapping[str, Any]) -> bytes | Mapping[str, Any]:
        """Return a row in the form in which it is sent. Called from any thread; raises what the values raise."""
        raise NotImplementedError

    def send(self, request: Mapping[str, Any]) -> None:
        raise NotImplementedError

    async def end(self, reply: Reply) -> None:
        """End the home and all processes that it has started; all seats get this reply."""
        raise NotImplementedError


def _reply(answer: Mapping[str, Any]) -> Reply:
    """Return the reply in a message. The message is checked, because user code may have written into the channel."""
    kind, value, reward = answer["kind"], answer["value"], answer["reward"]
    if kind not in ("ok", "error") or not isinstance(value, None | str | list | float):
        raise ValueError("not a reply")
    return Reply(kind, value, None if reward is None else float(reward), bool(answer["done"]), str(answer["error"]))
