"""The objects of one conversation, with a thread and random numbers of their own, where environments live."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import pickle
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from grpo.environments import results
from grpo.environments.describe import EnvironmentKind, kind_of, place_of, takes
from grpo.environments.seats import Reply
from grpo.environments.streams import CURRENT, Streams
from grpo.environments.toolbox import CLOSE, Maker, Makers, Tool, of_entry, tools_of
from grpo.errors import UserError

Errand = Callable[[], None]


class Thread:
    """A thread that does what it is told, one job after another. It does not keep the process from ending."""

    def __init__(self, name: str, streams: Streams | None = None) -> None:
        self._jobs: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._streams = streams
        self._given, self._done = 0, 0  # each is changed in one thread alone
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether all jobs are done."""
        return self._given == self._done

    def submit(self, job: Errand) -> None:
        self._given += 1
        self._jobs.put(job)

    def end(self) -> None:
        """End after the last job."""
        self._jobs.put(None)

    def interrupt(self) -> None:
        """Raise SystemExit in a job that hangs. It comes as soon as Python code runs; in a call in C that is never."""
        if not self.idle:
            thread, error = ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    def _work(self) -> None:
        CURRENT.set(self._streams)
        with contextlib.suppress(SystemExit):  # an interrupt that came when the job was just done
            while (job := self._jobs.get()) is not None:
                job()
                del job
                self._done += 1


class Chair:
    """Serves one conversation at a time. All of its synchronous calls are made in its thread, as sqlite3 wants it.

    `environment` is None before the first `reset`, after a `reset` that failed, and where there are tools alone.
    """

    def __init__(self, makers: Makers, loop: asyncio.AbstractEventLoop) -> None:
        self.environment: Any = None
        self.tools: dict[str, Tool] = {}
        self.broken = False
        """Whether it may serve no other conversation."""
        self._makers, self._loop = makers, loop
        self._streams = Streams()
        self.thread = Thread("environment", self._streams)
        self._owned: list[Any] | None = None
        self._kind: EnvironmentKind = "tools"
        self._awaited: asyncio.Future[Any] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing of it runs: no call in its thread, and none on the loop."""
        return self.thread.idle and self._awaited is None

    @property
    def objects(self) -> list[tuple[str, Any]]:
        """The environment and the tools that are objects, if they are made, each with its place: empty, `tools.0`."""
        owned = [(f"tools.{place}", one) for place, one in enumerate(self._owned or ())]
        return [(place, one) for place, one in [("", self.environment), *owned] if one is not None]

    def make(self) -> None:
        """Make the objects, if they are not there. Raises what the environment raises; ToolEntryError for the tools."""
        if self._owned is not None:
            return
        made = self._makers.environment
        environment = None if made is None else self._made(made)
        owned = [
            self._made_tool(place, tool) if tool.makes_objects else None
            for place, tool in enumerate(self._makers.tools)
        ]
        self.tools = tools_of(environment, self._makers.tools, owned)
        self.environment, self._owned, self._kind = environment, owned, kind_of(environment)

    def reset(self, columns: bytes | Mapping[str, Any], seed: int) -> Reply:
        try:
            given = pickle.loads(columns) if isinstance(columns, bytes) else dict(columns)
            self.make()
            self._streams.seed(seed)
            assert self._owned is not None
            for place, owned in enumerate(self._owned):  # they begin anew, too, and have nothing to say to the prompt
                if hasattr(owned, "reset"):
                    with of_entry(place, "reset: "):
                        self._reset(owned, given, seed)
            return results.of_reset(self._reset(self.environment, given, seed))
        except BaseException:
            self.discard()
            raise

    def call(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        tool = self.tools.get(name)
        if tool is None:
            raise ValueError(f"Tool {name} not found.")
        return results.of_tool(self.run(tool.function, {**arguments, **tool.given}))

    def step(self, message: Mapping[str, Any]) -> Reply:
        if self._kind == "text":
            return results.of_step(self.run(self.environment.step, {"text": message.get("content") or ""}))
        return results.of_step(self.run(self.environment.step, {"message": message}))

    def reward(self) -> Reply:
        return results.of_reward(self.run(self.environment.get_reward, {}))

    def rest(self) -> None:
        """The conversation is over: let tools that are objects give back what they hold, by `close`."""
        for owned in self._owned or ():
            with contextlib.suppress(Exception):  # nobody is left to be told
                self.run(getattr(owned, CLOSE, lambda: None), {})

    def discard(self) -> None:
        """Throw the objects away, and serve nobody else."""
        self.environment, self._owned, self.tools, self.broken = None, None, {}, True

    def cancel(self) -> None:
        """Cancel what it awaits, if anything. Called on the loop."""
        if self._awaited is not None:
            self._awaited.cancel()

    def run(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """What a function returns, or, if it is asynchronous, gives on the one loop. Called in the chair's thread."""
        value = function(**arguments)
        if not inspect.isawaitable(value):
            return value
        return asyncio.run_coroutine_threadsafe(self._await(value), self._loop).result()

    async def _await(self, value: Any) -> Any:
        self._awaited = asyncio.ensure_future(value)
        try:
            return await self._awaited
        finally:
            self._awaited = None

    def _made_tool(self, place: int, maker: Maker) -> Any:
        with of_entry(place, "it cannot be made: "):
            return self._made(maker)

    def _made(self, maker: Maker) -> Any:
        """An object. Raises UserError where it is called with other arguments than it has, and shows it."""
        try:
            return self.run(maker.make, maker.kwargs)
        except TypeError as error:
            if traceback.extract_tb(error.__traceback__)[-1].filename != __file__:  # its own code raised this
                raise
            advice = "it is called with what the recipe gives it in `kwargs`"
            if inspect.isroutine(maker.make):
                advice = (
                    "a function here makes the object that the model talks to. A function for the model to call "
                    "belongs in `tools`"
                )
            raise UserError(f"{error}{place_of(maker.make)}: {advice}") from None

    def _reset(self, instance: Any, columns: Mapping[str, Any], seed: int) -> Any:
        """What `reset` returns; it gets `seed` if it names that, and the dataset has no column of this name."""
        reset = getattr(instance, "reset", None)
        if reset is None:
            return None
        return self.run(reset, {"seed": seed, **columns} if takes(reset, "seed") else columns)
