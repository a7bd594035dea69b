"""The host of all environments of one name: worker processes with seats, or the trainer's own process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import weakref
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from grpo.environments import hosted
from grpo.environments.home import CLOSED, Home, LostError
from grpo.environments.loops import run_in_thread, stop
from grpo.environments.process import START_SECONDS
from grpo.environments.seat import HostSeat
from grpo.environments.seats import Description, HostedReward, LoadedReward, Seat
from grpo.errors import UserError
from grpo.processes.output import Output

Returned = TypeVar("Returned")
STOP_SECONDS = 5.0
"""How long to wait for a host's thread to end."""


@dataclass(frozen=True, slots=True)
class HostTerms:
    """Settings of a host.

    what           its label in error messages
    timeout        seconds for a call of a method
    reset_timeout  seconds for a call of `reset`
    tool_timeouts  seconds for a call of each of the recipe's tools
    workers        the number of processes
    several        whether the column `environment` selects this host; the column is then not passed to `reset`
    agent          whether its calls run an agent, whose errors are for people and not for the model
    late           text to append to the error of a call that took too long
    explain        adds what is known about the cause to an error
    """

    what: str
    timeout: float = 30.0
    reset_timeout: float = 60.0
    tool_timeouts: Sequence[float] = ()
    workers: int = 1
    several: bool = False
    agent: bool = False
    late: str = ""
    explain: Callable[[str], str] = field(default=lambda error: error)


class EnvironmentHost:
    """A `Host`: homes of one kind, and a thread whose event loop talks to them. Thread-safe."""

    def __init__(self, make_home: Callable[[bool], Home], terms: HostTerms, output: Output | None = None) -> None:
        """Starts all homes without waiting. `make_home(True)` makes a home that describes itself when it is ready."""
        self.terms = terms
        self._make_home, self._output = make_home, output
        self.loop, thread = run_in_thread(terms.what)
        self._stop = weakref.finalize(self, stop, self.loop, thread, STOP_SECONDS)  # also when Python exits
        self._closed = False
        self._rewards: list[HostedReward] = []
        self._hello: Mapping[str, Any] = {}
        self._all: list[Home] = []
        self._numbers = itertools.count()
        self._homes: list[Home] = self._wait(self._start())

    @property
    def description(self) -> Description:
        """What the environment and its tools are. Waits until the first home is ready.

        Raises UserError if the environment or a tool cannot be loaded.
        """
        return Description(**self._wait(self._ready())["description"])

    def seats(self, group: int, n: int) -> Sequence[Seat]:
        return self._wait(self._seats(group, n))

    def problem(self, columns: Collection[str]) -> str | None:
        given = [name for name in columns if not (self.terms.several and name == "environment")]
        problem: str | None = self._wait(self._asked({"op": "problem", "columns": given}, self.terms.what))
        return problem

    def load_reward(self, reward: HostedReward) -> LoadedReward:
        told = self._wait(self._load(reward))
        self._rewards.append(reward)
        return LoadedReward(**told)

    def reward_problem(self, name: str, columns: Collection[str]) -> str | None:
        request = {"op": "reward_problem", "name": name, "columns": list(columns)}
        problem: str | None = self._wait(self._asked(request, f"reward {name!r}"))
        return problem

    def score(self, name: str, seats: Sequence[Seat], columns: bytes, state: Mapping[str, Any]) -> Future[Any]:
        reward = next(reward for reward in self._rewards if reward.located.name == name)
        request = {"op": "score", "name": name, "columns": columns, "state": dict(state)}
        lost = hosted.failed(len(seats), CLOSED.error)
        ours = [seat for seat in seats if isinstance(seat, HostSeat)]
        return self.submit(self._score(reward, ours, request), lost)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result()
        self._stop()
        if self._output is not None:
            self._output.close()

    def submit(self, coroutine: Coroutine[Any, Any, Returned], closed: Returned) -> Future[Returned]:
        """Run a coroutine on the loop. If the host is closed, the result is `closed`."""
        if not self._closed:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        coroutine.close()
        future: Future[Returned] = Future()
        future.set_result(closed)
        return future

    def seconds(self, tool: str) -> float:
        """Return the time limit for a call of a tool, in seconds."""
        owner = self._hello.get("owners", {}).get(tool)
        return self.terms.timeout if owner is None else self.terms.tool_timeouts[owner]

    def _wait(self, coroutine: Coroutine[Any, Any, Returned]) -> Returned:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def _start(self) -> list[Home]:
        return [self._home(describes=place == 0) for place in range(self.terms.workers)]

    def _home(self, describes: bool = False) -> Home:
        home = self._make_home(describes)
        self._all = [*(one for one in self._all if one.lost is None), home]
        return home

    async def _ready(self) -> Mapping[str, Any]:
        """Return the first process's description. It remains valid if that process is lost later."""
        home = self._homes[0]
        if not self._hello:
            await home.ready.wait()
            if home.problem is not None and not home.hello.get("description"):
                raise self._refused(self.terms.what, home.problem)
            self._hello = home.hello
        return self._hello

    def _refused(self, what: str, problem: str) -> UserError:
        said = self.terms.explain(problem)
        return UserError(
            said if said.startswith(("environment ", "agent ", "tool ", "tools.", "reward ")) else f"{what}: {said}"
        )

    async def _seats(self, group: int, n: int) -> list[HostSeat]:
        if self._output is not None and not any(home.seats for home in self._homes):
            self._output.begin()
        place = group % len(self._homes)
        home = self._homes[place]
        if home.retired or home.gone:
            home = self._homes[place] = self._home()
            self._loading = [asyncio.ensure_future(self._load_again(home, reward)) for reward in self._rewards]
        seats = [HostSeat(self, home, next(self._numbers)) for _ in range(n)]
        home.seats.update(seat.number for seat in seats)
        return seats

    async def _load(self, reward: HostedReward) -> Mapping[str, Any]:
        told = await asyncio.gather(*(self._load_into(home, reward) for home in self._homes))
        return dict(told[0])

    async def _load_again(self, home: Home, reward: HostedReward) -> None:
        """Load a reward into a new home. If this fails, each call of the reward reports it."""
        with contextlib.suppress(UserError):
            await self._load_into(home, reward)

    async def _load_into(self, home: Home, reward: HostedReward) -> Any:
        request = {"op": "load", "reward": reward if home.holds_objects else replace(reward, function=None)}
        return await self._administer(home, request, f"reward {reward.located.name!r}")

    async def _asked(self, request: Mapping[str, Any], what: str) -> Any:
        return await self._administer(self._homes[0], request, what)

    async def _administer(self, home: Home, request: Mapping[str, Any], what: str) -> Any:
        """Return a home's answer to a request. Raises UserError, with the reason, if there is none."""
        try:
            return await home.administer(request, START_SECONDS)
        except TimeoutError:
            raise self._refused(what, f"no answer in {START_SECONDS:g} s") from None
        except (UserError, LostError) as error:
            raise self._refused(what, str(error)) from None

    async def _score(self, reward: HostedReward, seats: Sequence[HostSeat], request: dict[str, Any]) -> dict[str, Any]:
        home, count = seats[0].home, len(seats)
        try:
            answer = await home.administer({**request, "seats": [seat.number for seat in seats]}, reward.timeout)
        except TimeoutError:
            said = f"no answer in {reward.timeout:g} s in this call, so its thread was abandoned"
            return hosted.failed(count, said, "timeout", reward.timeout, fatal=True)
        except LostError as error:
            return hosted.failed(count, error.reply.error, fatal=True)
        except UserError as error:
            return hosted.failed(count, self.terms.explain(str(error)))
        failures = {int(place): self.terms.explain(str(error)) for place, error in answer["failures"].items()}
        return {**answer, "failures": failures}

    async def _end(self) -> None:
        await asyncio.gather(*(home.end(CLOSED) for home in self._all))
        left = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(left, timeout=1.0) if left else None
        await self.loop.shutdown_default_executor()
