"""Everything in one environment process: chairs for many conversations, one event loop, rewards that see environments.

Requests and answers are dictionaries. A request has an operation (`op`), a number (`id`) that its answer repeats, and
for most operations a seat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from grpo.environments import results
from grpo.environments.agent import Agent
from grpo.environments.chair import Chair, Thread
from grpo.environments.describe import describe, reset_problem, schema_of
from grpo.environments.hosted import HostedRewards
from grpo.environments.loops import run_in_thread, stop
from grpo.environments.seats import Reply
from grpo.environments.toolbox import Makers, ToolEntryError
from grpo.errors import UserError

Reporter = Callable[[dict[str, Any]], None]
PATIENCE, GLANCE = 1.0, 0.02
"""Seconds in which a call that was given up must end, and the interval between checks whether it has ended."""


class Chairs:
    """Serves requests. Calls `answer` with each answer, from several threads; `handle` never blocks."""

    def __init__(self, makers: Makers, answer: Reporter) -> None:
        self._makers, self._answer = makers, answer
        self._loop, self._looping = run_in_thread("asynchronous calls")
        self._seats: dict[int, Chair] = {}
        self._free: list[Chair] = []
        self._office = Thread("rewards")
        self._rewards = HostedRewards(self._loop)

    def close(self) -> None:
        """End the threads that can be ended. Closing again does nothing."""
        for thread in (*(chair.thread for chair in (*self._seats.values(), *self._free)), self._office):
            thread.end()
            thread.interrupt()
        stop(self._loop, self._looping, 0)

    def hello(self, name: str | None) -> dict[str, Any]:
        """Describe the environment and its tools. This creates the first objects, which later serve a conversation.

        `owners` maps each tool to its index among the recipe's tools, or to None for methods of the environment. Raises
        UserError if the objects cannot be created or a tool has no schema (ToolEntryError for mistakes in `tools`).
        """
        chair = Chair(self._makers, self._loop)
        made: Future[None] = Future()
        chair.thread.submit(lambda: _try(made, chair.make))
        try:
            made.result()
        except ToolEntryError:
            raise
        except BaseException as error:  # SystemExit, too
            said = results.of_exception(error, tool=False).error
            raise UserError(f"cannot be created: {said}") from error
        self._free.append(chair)
        schemas = [] if isinstance(chair.environment, Agent) else [self._schema(chair, name) for name in chair.tools]
        owners = {name: tool.owner for name, tool in chair.tools.items()}
        functions = {name: tool.function for name, tool in chair.tools.items()}
        return {"description": asdict(describe(name, chair.environment, schemas, functions)), "owners": owners}

    def handle(self, request: Mapping[str, Any]) -> None:
        """Start a requested operation. The answer follows when it is done."""
        op = request["op"]
        if op == "release":
            self._release(request["seat"])
        elif op == "drop" and request["seat"] is None:
            self._office.end()
            self._office.interrupt()
            self._office = Thread("rewards")
            self._answer({"id": request["id"], "ended": False})
        elif op == "drop":
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drop(request)))
        elif op in ("reset", "call", "step", "reward"):
            chair = self._chair(request["seat"])
            chair.thread.submit(lambda: self._serve(chair, request))
        else:
            self._office.submit(lambda: self._administer(request))

    def _chair(self, seat: int) -> Chair:
        if seat not in self._seats:
            self._seats[seat] = self._free.pop() if self._free else Chair(self._makers, self._loop)
        return self._seats[seat]

    def _serve(self, chair: Chair, request: Mapping[str, Any]) -> None:
        """Run an operation in the chair's thread. An exception becomes a reply, too."""
        op = request["op"]
        try:
            reply: Reply = getattr(chair, op)(**request["arguments"])
        except BaseException as error:  # user code
            reply = results.of_exception(error, tool=op == "call")
        self._answer({"id": request["id"], **asdict(reply)})

    def _release(self, seat: int) -> None:
        chair = self._seats.pop(seat, None)
        if chair is not None and not chair.broken:
            chair.thread.submit(chair.rest)
            self._free.append(chair)
        elif chair is not None:
            chair.thread.end()

    async def _drop(self, request: Mapping[str, Any]) -> None:
        """Give up a seat's call and its objects. The answer says whether the call has ended."""
        chair = self._seats.pop(request["seat"], None)
        ended = chair is None
        if chair is not None:
            chair.discard()
            chair.thread.end()
            chair.cancel()
            deadline = self._loop.time() + PATIENCE
            while not (ended := chair.idle) and self._loop.time() < deadline:
                await asyncio.sleep(GLANCE)
            if not ended:  # interrupted only now: no other conversation uses the state that it leaves half done
                chair.thread.interrupt()
        self._answer({"id": request["id"], "ended": ended})

    def _administer(self, request: Mapping[str, Any]) -> None:
        try:
            if request["op"] == "problem":
                answer: Any = self._problem(request["columns"])
            else:
                environments = [self._environment(seat) for seat in request.get("seats", ())]
                answer = self._rewards.handle(request, environments)
            self._answer({"id": request["id"], "answer": answer})
        except BaseException as error:  # user code
            said = str(error) if isinstance(error, UserError | ValueError) else results.of_exception(error, False).error
            self._answer({"id": request["id"], "error": said})

    def _environment(self, seat: int) -> Any:
        """Return a seat's environment; None if the seat is lost."""
        chair = self._seats.get(seat)
        return None if chair is None else chair.environment

    def _problem(self, columns: list[str]) -> str | None:
        """Return why a `reset` or an agent cannot be called with these columns; None if it can, or if no objects
        exist."""
        chair = next((chair for chair in (*self._free, *self._seats.values()) if chair.objects), None)
        for owner, one in chair.objects if chair else ():
            if isinstance(one, Agent):
                return one.problem(columns)
            if hasattr(one, "reset") and (problem := reset_problem(one.reset, columns)) is not None:
                return f"{owner} ({type(one).__name__}): {problem}" if owner else problem
        return None

    def _schema(self, chair: Chair, name: str) -> dict[str, Any]:
        tool = chair.tools[name]
        owner = "" if tool.owner is None else f"tools.{tool.owner}"
        return schema_of(name, tool.function, tuple(tool.given), owner)


def _try(future: Future[None], function: Callable[[], None]) -> None:
    try:
        function()
        future.set_result(None)
    except BaseException as error:  # raised in the thread that waits for the future
        future.set_exception(error)
