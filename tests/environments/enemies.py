"""Environments that each misbehave in a way of their own, and one that does not."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time


class Good:
    def reset(self, **row):
        self.total = 0

    def add(self, n: int) -> int:
        """Add.

        Args:
            n: How many.
        """
        self.total += n
        return self.total

    def get_reward(self):
        return self.total


class HangsInReset(Good):
    def reset(self, hang=True, **row):
        super().reset()
        while hang:
            time.sleep(0.01)


class Bad(Good):
    """What `do` does is asked for by name."""

    def do(self, what: str) -> str:
        """Do it.

        Args:
            what: What to do.
        """
        return getattr(self, f"_{what}")()

    async def do_async(self, what: str) -> str:
        """Do it asynchronously.

        Args:
            what: What to do.
        """
        if what == "sleep":
            await asyncio.sleep(1000)
        if what == "block":
            time.sleep(1000)
        while what == "defy":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)

    def _hang(self):
        time.sleep(1000)

    def _spin(self):
        while True:
            pass

    def _exit(self):
        os._exit(3)

    def _segfault(self):
        ctypes.string_at(0)

    def _fill(self):
        held = [b"x" * (100 << 20) for _ in range(300)]
        return str(len(held))

    def _print(self):
        for _ in range(100):
            sys.stdout.write("x" * 1_000_000)
        return "printed"

    def _tell(self):
        return "x" * 100_000_000

    def _hold(self):
        """A call in C that never ends and lets no other thread run."""
        ctypes.PyDLL(None).pause()

    def _fork(self):
        for _ in range(30):
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.setsid()
                time.sleep(1000)
        return "forked"

    def _twice(self):
        os.fork()
        return "twice"

    def _close(self):
        os.closerange(3, 1000)
        return "closed"

    def _noise(self):
        for descriptor in range(3, 200):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"\0\0\0\0\0\0\0\x02{}" * 100)
        time.sleep(5)

    def _leave(self):
        sys.exit(4)


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


class Thing:
    def __str__(self):
        raise ValueError("no words")

    __repr__ = __str__


class Wrong(Good):
    """Of wrong types everywhere."""

    def reset(self, what=None, **row):
        super().reset()
        if what == "raise":
            raise ZeroDivisionError("division")
        return {None: None, "number": 5, "thing": Thing(), "list": [1]}[what]

    def thing(self) -> str:
        """A thing."""
        return Thing()

    def numbers(self) -> str:
        """Numbers."""
        return [1, 2]

    def blocks(self) -> str:
        """Blocks that JSON cannot represent."""
        return [{"type": "text", "text": Thing()}]

    def unprintable(self) -> str:
        """Raise."""
        raise Unprintable

    def interrupt(self) -> str:
        """Raise."""
        raise KeyboardInterrupt

    def nothing(self) -> str:
        """Raise."""
        raise RuntimeError

    def get_reward(self):
        return "much"
