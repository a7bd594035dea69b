"""A process in the sandbox: how it is started, watched over and ended."""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from grpo.processes import tree

LAUNCHER = Path(__file__).with_name("launcher.py")
HOME = "/sandbox"
"""The one place in the sandbox where the code may write."""
UNBUILT = 113
"""Exit code where the sandbox itself could not be built."""
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
"""What the code can read of this machine, beside the Python that runs it. Homes, /etc, /proc and /run are not there."""
INTERVAL = 0.02
"""Seconds between two looks at the memory."""
NOBODY = 1 << 30
"""Users from here on are nobody's; each run of root's has one of its own, so that their limits do not add up."""
FILES = 128
"""Files that a process may have open."""

_starting = ThreadPoolExecutor(1, "sandbox")
"""Its thread starts all cells: the kernel ends a process of a sandbox with the thread, and not only the process, that
has started it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the code may use: seconds on the wall; the rest is of all its processes.

    A process that asks for more than `memory_mb` gets a MemoryError; processes that together hold more are killed.
    `each_process`: whether `seconds` limit the processor time of each process, too, from its start on.
    """

    seconds: float = 5.0
    memory_mb: int = 1024
    processes: int = 32
    disk_mb: int = 64
    each_process: bool = True


class End(Enum):
    """Why a run was over: the code's own doing, or a limit."""

    CODE, TIME, MEMORY = range(3)


class Cell:
    """A Python in the sandbox, and everything that it starts there."""

    def __init__(self, arguments: Sequence[str], limits: Limits, unsafe: bool, stdin: int, complaints: int) -> None:
        """Start Python with `arguments`. With `unsafe` there is no sandbox, only limits.

        `complaints` takes what it writes to standard error, and the reason where there is no sandbox.
        """
        self.limits = limits
        self._folder = tempfile.TemporaryDirectory(prefix="grpo-sandbox-", ignore_cleanup_errors=True)
        settings = {
            "unsafe": unsafe,
            "cpu_seconds": max(1, round(limits.seconds)) if limits.each_process else None,
            "memory": limits.memory_mb << 20,
            "disk": limits.disk_mb << 20,
            "processes": limits.processes,
        }
        home = self._folder.name if unsafe else HOME
        self.process = _starting.submit(
            subprocess.Popen,
            launched(arguments, self._folder.name, settings),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **variables(home)},
            cwd=self._folder.name,
            start_new_session=True,
        ).result()
        self.end = weakref.finalize(self, _end, self.process, self._folder)

    def watch(self, readers: Mapping[int, Callable[[bytes], bool]], seconds: float | None = None) -> End:
        """Give what comes out of descriptors to their readers, until one says that it has all, or a limit is met.

        The end of a stream is given as b"". `seconds` are those of the limits if none are given.
        """
        look = time.monotonic()
        deadline = look + (self.limits.seconds if seconds is None else seconds)
        with selectors.DefaultSelector() as selector:
            for descriptor in readers:
                selector.register(descriptor, selectors.EVENT_READ)
            while (now := time.monotonic()) < deadline:
                if now >= look:  # whatever it writes meanwhile
                    if tree.use_more_than(self.pids(), self.limits.memory_mb << 20):
                        return End.MEMORY
                    look = now + INTERVAL
                for ready, _ in selector.select(min(deadline, look) - now):
                    part = _read(ready.fd)
                    if not part:
                        selector.unregister(ready.fd)
                    if readers[ready.fd](part):
                        return End.CODE
        return End.TIME

    def pids(self) -> list[int]:
        return [self.process.pid, *tree.descendants(self.process.pid)]


def launched(arguments: Sequence[str], folder: str, settings: Mapping[str, Any]) -> list[str]:
    """The command that runs this Python with `arguments` in the sandbox, whose root is made on the empty `folder`.

    `settings`: `unsafe`, bytes of `memory` for a process and of `disk`, `cpu_seconds`, `processes`, and if need be more
    that is `readable` and the open `files` of a process.
    """
    python = os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys.executable
    own = (
        sys.base_prefix,
        sys.base_exec_prefix,
        sys.prefix,
        sys.exec_prefix,
        os.path.dirname(os.path.realpath(python)),
    )
    whole = {
        "root": folder,
        "home": HOME,
        "unbuilt": UNBUILT,
        "files": FILES,
        **settings,
        "readable": sorted({*SYSTEM, *own, *settings.get("readable", ())}),  # what is in a shown folder comes after it
        "command": [python, *arguments],
        "user": NOBODY + random.SystemRandom().randrange(NOBODY),
    }
    return [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(whole)]


def variables(home: str) -> dict[str, str]:
    """What the environment of a process in the sandbox says of its place, and of threads."""
    return {"HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except ConnectionError:  # a socket whose other end is gone with what was sent to it
        return b""


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    """Kill all of a cell, and leave nothing behind."""
    for pid in tree.descendants(process.pid):  # without a sandbox they may have sessions of their own
        tree.end(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
    folder.cleanup()
