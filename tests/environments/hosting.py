"""Hosts for tests: of the environments and tools in `games.py`."""

import contextlib
import os
import signal
import time
from pathlib import Path

import games

from grpo.config.environment import EnvironmentConfig, ToolConfig
from grpo.environments.making import make_host
from grpo.processes.tree import descendants

GAMES = Path(games.__file__)


class Hosts:
    """Makes each host once, since a process takes a while to start, and closes all."""

    def __init__(self) -> None:
        self._made = {}

    def __call__(self, *arguments, **settings):
        key = repr((arguments, settings))
        if key not in self._made:
            self._made[key] = opened(*arguments, **settings)
        return self._made[key]

    def close(self) -> None:
        for host in self._made.values():
            host.close()


def opened(name, tools=(), inline=False, several=False, workers=1, tool_settings=None, **settings):
    """The host of a class or function in `games.py`, and of `tools`: pairs of a name there and the recipe's kwargs."""
    use = None if name is None else f"{GAMES}:{name}"
    config = EnvironmentConfig(use=use, **settings)
    configs = [ToolConfig(use=f"{GAMES}:{tool}", kwargs=kwargs, **(tool_settings or {})) for tool, kwargs in tools]
    given = getattr(games, name) if inline and name else None
    functions = [getattr(games, tool) for tool, _ in tools] if inline else ()
    return make_host(config, configs, several, workers, given, functions)


def seat_of(host, seed: int = 0, **columns):
    """A seat, and the reply to its reset."""
    (seat,) = host.seats(0, 1)
    reply = seat.reset(columns, seed).result()
    return seat, reply


def names(description) -> list[str]:
    return [tool["function"]["name"] for tool in description.tools]


def kill(seat) -> None:
    """Kill the process in which a seat lives, as the kernel does: its keeper and its host have to notice.

    `ChildProcess.kill` is not for other threads than the host's: it closes a descriptor that the event loop watches.
    """
    (worker,) = descendants(seat.home._process.pid)
    os.kill(worker, signal.SIGKILL)


@contextlib.contextmanager
def slow_keeper(seat):
    """The keeper of a seat's process says nothing of its end until the block is left."""
    keeper = seat.home._process.pid
    os.kill(keeper, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGCONT)


def begin(call, seat):
    """The future of a call that is under way, and not only asked for."""
    future = call()
    until(seat._turn.locked)
    return future


def until(condition, seconds: float = 20.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
