"""All that lives in one process: chairs for many conversations at once, one event loop, rewards that see environments.

Requests and answers are dictionaries. A request names an operation (`op`), most of them the seat that it is for, and a
number (`id`) that its answer has too.
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
"""Seconds that a call which is given up has to end, and between two looks whether it has."""


class Chairs:
    """Answers requests by `answer`, from several threads. `handle` never waits."""

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
        """What the environment and its tools are, found out from the first objects, which will serve.

        `owners` holds for each tool its place among the recipe's tools, or None for the environment's. Raises UserError
        if they cannot be made, and for tools without a schema (ToolEntryError for mistakes in `tools`).
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
            raise UserError(f"it cannot be made: {said}") from error
        self._free.append(chair)
        schemas = [] if isinstance(chair.environment, Agent) else [self._schema(chair, name) for name in chair.tools]
        owners = {name: tool.owner for name, tool in chair.tools.items()}
        functions = {name: tool.function for name, tool in chair.tools.items()}
        return {"description": asdict(describe(name, chair.environment, schemas, functions)), "owners": owners}

    def handle(self, request: Mapping[str, Any]) -> None:
        """Begin what is asked for. The answer comes when it is done."""
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
        """In the chair's thread: whatever happens there is a reply."""
        op = request["op"]
        try:
            reply: Reply = getattr(chair, op)(**request["arguments"])
        except BaseException as error:  # other people's code, in a thread of its own
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
        """Give up what a seat is at, and its objects; the answer says whether it has ended."""
        chair = self._seats.pop(request["seat"], None)
        ended = chair is None
        if chair is not None:
            chair.discard()
            chair.thread.end()
            chair.cancel()
            deadline = self._loop.time() + PATIENCE
            while not (ended := chair.idle) and self._loop.time() < deadline:
                await asyncio.sleep(GLANCE)
            if not ended:  # it may stop now, but what it leaves half done is for nobody else to find
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
        except BaseException as error:  # other people's code
            said = str(error) if isinstance(error, UserError | ValueError) else results.of_exception(error, False).error
            self._answer({"id": request["id"], "error": said})

    def _environment(self, seat: int) -> Any:
        """None for a seat that is lost."""
        chair = self._seats.get(seat)
        return None if chair is None else chair.environment

    def _problem(self, columns: list[str]) -> str | None:
        """Why a `reset` could not be called with these columns, or an agent not run, as far as there are objects."""
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
    except BaseException as error:  # to be raised where it is waited for
        future.set_exception(error)
