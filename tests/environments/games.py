"""Environments and tools that behave, as TRL has them."""

import asyncio
import os
import random
import sqlite3
import sys
import threading
import time
from random import randint

import numpy as np

from grpo.step import Step


class Base:
    def look(self) -> str:
        """Look around."""
        return f"at {self.place}"


class Walk(Base):
    """Walk on a line, from where the row says."""

    made = 0

    def __init__(self, size: int = 9):
        type(self).made += 1
        self.size, self.bound = size, self._bound

    def reset(self, start, **row):
        self.place, self.row = start, row
        return f" You are at {start}."

    def move(self, by: int, fast: bool = False) -> str:
        """Move.

        Args:
            by: How far.
            fast: Whether to hurry.
        """
        if abs(self.place + by) > self.size:
            raise ValueError("Game over.")
        self.place += by
        return self.place

    async def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: How long.
        """
        await asyncio.sleep(seconds)
        return "waited"

    @staticmethod
    def rules() -> str:
        """Say the rules."""
        return "none"

    @classmethod
    def count(cls) -> int:
        """Say how many were made."""
        return cls.made

    def blocks(self) -> list:
        """Show it."""
        return [{"type": "text", "text": "é\ud800"}]

    def scored(self) -> Step:
        """Say it with a reward."""
        return Step("well", 0.5, True)

    def columns(self) -> str:
        """Say what the row has."""
        return sorted(self.row)

    def _bound(self) -> str:
        """Say that it is bound."""
        return "bound"

    def get_reward(self):
        return self.place


def make_walk(size: int = 9):
    return Walk(size)


class Guess:
    """Answers as the user does."""

    def reset(self, seed, **row):
        self.seed, self.secret = seed, random.randint(0, 10**9)

    def step(self, text):
        if text == "secret":
            return f"{self.seed} {self.secret}"
        return Step(None if text == "end" else text.upper(), 1.0, done=text == "end")

    def undocumented_helper(self): ...

    async def get_reward(self):
        await asyncio.sleep(0)
        return np.float32(0.5)


class Chat:
    def step(self, message):
        if message["content"] == "many":
            return [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        return {"role": "user", "content": f"{message['role']} said {message['content']}"}

    def hint(self) -> str:
        """Give a hint."""
        return "hint"


class Gym:
    """Its `step` is a tool: the parameter is called otherwise."""

    def step(self, action: str) -> str:
        """Act.

        Args:
            action: What to do.
        """
        return action


class Dice:
    """Draws in every way that there is, with a pause in between."""

    def __init__(self):
        self.made_with = random.random()

    def reset(self, **row):
        self.first = [random.random(), randint(0, 10**6), float(np.random.rand())]

    def roll(self) -> str:
        """Roll."""
        random.shuffle(shuffled := list(range(5)))
        order = list({"a", "b", "c", "d", "e"})  # as the hashes of texts have it
        return [
            self.first,
            random.gauss(0, 1),
            randint(0, 9),
            np.random.randint(10**6),
            shuffled,
            order,
            self.made_with,
        ]

    async def roll_slowly(self) -> str:
        """Roll, and let others roll."""
        drawn = []
        for _ in range(5):
            drawn.append((random.random(), float(np.random.normal())))
            await asyncio.sleep(0)
        return drawn


class Light:
    """Its process should have loaded little."""

    def reset(self, **_):
        return str(sorted({"mlx", "mlx.core", "torch", "pydantic"} & set(sys.modules)))


class Secretive:
    def reset(self, name, **_):
        return os.environ[name]


class Stuck:
    def reset(self, **_): ...

    def hang(self) -> str:
        """Hang."""
        time.sleep(1000)

    def spin(self) -> str:
        """Hang in Python."""
        while True:
            pass

    def tell(self) -> str:
        """Tell."""
        return "told"


class Notebook:
    """sqlite3 refuses what was made in another thread."""

    def __init__(self):
        self.pages = sqlite3.connect(":memory:")
        self.thread = threading.get_ident()

    def reset(self, **_):
        self.pages.execute("create table if not exists page (text)")
        self.pages.execute("delete from page")

    def write(self, text: str) -> int:
        """Write a page.

        Args:
            text: What it says.
        """
        self.pages.execute("insert into page values (?)", [text])
        return self.pages.execute("select count(*) from page").fetchone()[0]


class Crowd:
    """Counts how many wait at once."""

    now = 0

    async def wait(self, others: int) -> int:
        """Wait for the others.

        Args:
            others: How many.
        """
        kind = type(self)
        kind.now += 1
        deadline = time.monotonic() + 20
        while kind.now < others and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return kind.now


def search(query: str, limit: int, key: str = "") -> str:
    """Search.

    Args:
        query: What for.
        limit: How many.
    """
    return f"{query} {limit} {key}"


class Counter:
    """A tool with an object for each conversation."""

    def __init__(self, start: int = 0):
        self.start = start

    def reset(self, **_):
        self.value = self.start

    def add(self, n: int) -> int:
        """Add.

        Args:
            n: How many.
        """
        self.value += n
        return self.value


class NoHints:
    def jump(self, far):
        """Jump.

        Args:
            far: How far.
        """


class NoWords:
    def jump(self, far: int) -> str:
        """Jump."""


class NoObject:
    def __init__(self):
        raise RuntimeError("no board")


class Picky:
    def reset(self, question):
        return question

    def look(self) -> str:
        """Look."""


class OwnLoop:
    async def rollout(self, task, sampler):
        return []


def sees_environments(completions, environments, **_):
    return [env.place + len(text) for env, text in zip(environments, completions, strict=True)]
