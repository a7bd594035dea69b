"""Starts, monitors and ends a process in the sandbox."""

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
"""The only folder in the sandbox that the code can write to."""
UNBUILT = 113
"""Exit code if the sandbox itself cannot be built."""
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
"""Paths of this machine that the code can read, in addition to its Python. Home folders, /etc, /proc and /run are
missing."""
INTERVAL = 0.02
"""Seconds between two measurements of memory."""
NOBODY = 1 << 30
"""First of the unused user ids. Each run started by root gets its own user, so that process limits do not add up."""
FILES = 128
"""Most open files of a process."""

_starting = ThreadPoolExecutor(1, "sandbox")
"""One thread starts all cells, because the kernel kills a sandbox when the thread that started it ends, even if the
process goes on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the code's resources: `seconds` of wall time; the other limits are for all its processes together.

    A process that requests more than `memory_mb` gets a MemoryError. Processes that hold more together are killed.
    `each_process` says whether `seconds` also limits the processor time of each process since its start.
    """

    seconds: float = 5.0
    memory_mb: int = 1024
    processes: int = 32
    disk_mb: int = 64
    each_process: bool = True


class End(Enum):
    """Why a run ended: because of the code itself, or because of a limit."""

    CODE, TIME, MEMORY = range(3)


class Cell:
    """A Python process in the sandbox, and all processes that it starts there."""

    def __init__(self, arguments: Sequence[str], limits: Limits, unsafe: bool, stdin: int, complaints: int) -> None:
        """Start Python with `arguments`. With `unsafe` there is no sandbox, only limits.

        `complaints` is the descriptor for standard error, and for the reason if the sandbox cannot be built.
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
        """Pass the data from descriptors to their readers, until a reader returns True or a limit is exceeded.

        The end of a stream is passed as b"". `seconds` defaults to that of the limits.
        """
        look = time.monotonic()
        deadline = look + (self.limits.seconds if seconds is None else seconds)
        with selectors.DefaultSelector() as selector:
            for descriptor in readers:
                selector.register(descriptor, selectors.EVENT_READ)
            while (now := time.monotonic()) < deadline:
                if now >= look:  # on time, even if data arrives all the time
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
    """The command that runs this Python with `arguments` in the sandbox, whose root is mounted on the empty `folder`.

    `settings`: `unsafe`, bytes of `memory` per process and of `disk`, `cpu_seconds`, `processes`, and optionally
    further `readable` paths and the open `files` per process.
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
        "readable": sorted({*SYSTEM, *own, *settings.get("readable", ())}),  # sorted: folders before their contents
        "command": [python, *arguments],
        "user": NOBODY + random.SystemRandom().randrange(NOBODY),
    }
    return [sys.executable, "-I", "-S", str(LAUNCHER), json.dumps(whole)]


def variables(home: str) -> dict[str, str]:
    """Environment variables of a process in the sandbox: its folders, and one thread for numerical libraries."""
    return {"HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except ConnectionError:  # a socket whose other end is gone, with unread data
        return b""


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    """Kill all processes of a cell, and remove its folder."""
    for pid in tree.descendants(process.pid):  # without a sandbox they may be in other sessions
        tree.end(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
    folder.cleanup()
