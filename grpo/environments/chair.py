"""The objects of one conversation in the environments' process, with their own thread and random numbers."""

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
    """A daemon thread that runs submitted jobs, one after another."""

    def __init__(self, name: str, streams: Streams | None = None) -> None:
        self._jobs: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._streams = streams
        self._given, self._done = 0, 0  # each is changed by one thread only
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
        """Raise SystemExit in a job that hangs. This takes effect in Python code only, never during a call into C."""
        if not self.idle:
            thread, error = ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    def _work(self) -> None:
        CURRENT.set(self._streams)
        with contextlib.suppress(SystemExit):  # an interrupt may arrive just after the job has ended
            while (job := self._jobs.get()) is not None:
                job()
                del job
                self._done += 1


class Chair:
    """Serves one conversation at a time.

    All of its synchronous calls run in its own thread, because objects such as sqlite3 connections require one thread.
    `environment` is None before the first `reset`, after a `reset` that failed, and if there are only tools.
    """

    def __init__(self, makers: Makers, loop: asyncio.AbstractEventLoop) -> None:
        self.environment: Any = None
        self.tools: dict[str, Tool] = {}
        self.broken = False
        """Whether it must not serve another conversation."""
        self._makers, self._loop = makers, loop
        self._streams = Streams()
        self.thread = Thread("environment", self._streams)
        self._owned: list[Any] | None = None
        self._kind: EnvironmentKind = "tools"
        self._awaited: asyncio.Future[Any] | None = None

    @property
    def idle(self) -> bool:
        """Whether no call of it is running, neither in its thread nor on the loop."""
        return self.thread.idle and self._awaited is None

    @property
    def objects(self) -> list[tuple[str, Any]]:
        """The environment and the tools that are objects, if they exist, each with its place: `""` or `tools.0`."""
        owned = [(f"tools.{place}", one) for place, one in enumerate(self._owned or ())]
        return [(place, one) for place, one in [("", self.environment), *owned] if one is not None]

    def make(self) -> None:
        """Create the objects unless they exist. Raises what the environment raises, and ToolEntryError for tools."""
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
            for place, owned in enumerate(self._owned):  # tools are reset too, but cannot add to the prompt
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
        """Call `close` of tools that are objects at the end of a conversation, so that they free their resources."""
        for owned in self._owned or ():
            with contextlib.suppress(Exception):  # the conversation is over: there is nowhere to report an error
                self.run(getattr(owned, CLOSE, lambda: None), {})

    def discard(self) -> None:
        """Drop the objects, and serve no other conversation."""
        self.environment, self._owned, self.tools, self.broken = None, None, {}, True

    def cancel(self) -> None:
        """Cancel the asynchronous call that it awaits, if any. Called on the loop."""
        if self._awaited is not None:
            self._awaited.cancel()

    def run(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Call a function and return its result. An asynchronous function runs on the loop. Called in the chair's
        thread."""
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
        with of_entry(place, "cannot be created: "):
            return self._made(maker)

    def _made(self, maker: Maker) -> Any:
        """Create an object. Raises UserError, which names the place, if its parameters do not match the arguments."""
        try:
            return self.run(maker.make, maker.kwargs)
        except TypeError as error:
            if traceback.extract_tb(error.__traceback__)[-1].filename != __file__:  # raised inside the user's code
                raise
            advice = "it is called with the arguments in the recipe's `kwargs`"
            if inspect.isroutine(maker.make):
                advice = (
                    "a function here must create the object that the model talks to. A function for the model to call "
                    "belongs in `tools`"
                )
            raise UserError(f"{error}{place_of(maker.make)}: {advice}") from None

    def _reset(self, instance: Any, columns: Mapping[str, Any], seed: int) -> Any:
        """Call `reset` and return its result. It gets `seed` if it has this parameter and no column has this name."""
        reset = getattr(instance, "reset", None)
        if reset is None:
            return None
        return self.run(reset, {"seed": seed, **columns} if takes(reset, "seed") else columns)
