"""Code against tests, in the sandbox: one call, one verdict."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from grpo.processes.child import ending
from grpo.processes.tree import descendants, use_more_than

FOLDER = Path(__file__).parent
HOME = "/sandbox"
"""The one place in the sandbox where the code may write."""
UNBUILT = 113
"""Exit code where the sandbox itself could not be built."""
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
"""What the code can read of this machine, beside the Python that runs it. Homes, /etc, /proc and /run are not there."""
LARGEST_VERDICT = 1 << 16
INTERVAL = 0.02
"""Seconds between two looks at the memory."""
NOBODY = 1 << 30
"""Users from here on are nobody's; each run of root's has one of its own, so that their limits do not add up."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the code may use: seconds on the wall (and of each process on the CPU); the rest is of all its processes.

    A process that asks for more than `memory_mb` gets a MemoryError; processes that together hold more are killed.
    """

    seconds: float = 5.0
    memory_mb: int = 1024
    processes: int = 32
    disk_mb: int = 64


class End(Enum):
    """Why a run was over: the code's own doing, or a limit."""

    CODE, TIME, MEMORY = range(3)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many of the tests passed, and the first thing that went wrong."""

    passed: int
    error: str | None


def run_tests(code: str, tests: Sequence[Any], limits: Limits, unsafe: bool = False) -> Tally:
    """Run `code`, then `tests` on it: pieces of code that raise where they fail, or `{input, output}` of a program.

    Raises RuntimeError where the sandbox cannot be built; with `unsafe` there is none, only limits.
    """
    seal = secrets.token_hex(16)
    job = json.dumps({"seal": seal, "code": code, "tests": list(tests)}).encode()
    with tempfile.TemporaryDirectory(prefix="grpo-sandbox-", ignore_cleanup_errors=True) as folder:
        environment = {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": folder if unsafe else HOME,
            "TMPDIR": folder if unsafe else HOME,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as complaints:
            given.write(job)
            given.seek(0)
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(FOLDER / "launcher.py"),
                    json.dumps(_settings(folder, limits, unsafe)),
                ],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
            said, end = _read(process, limits)
            complaints.seek(0)
            why = complaints.read(1000).decode(errors="replace").strip()
    if process.returncode == UNBUILT and why:  # the code has no way to those complaints
        raise RuntimeError(f"the sandbox cannot be built: {why}")
    return _verdict(said, seal, end, process.returncode, limits)


@functools.cache
def missing() -> str | None:
    """Why there can be no sandbox here; None where there can be."""
    if sys.platform != "linux":
        return f"on {sys.platform} there is no isolation yet, only on Linux"
    if os.uname().machine not in ("x86_64", "aarch64"):
        return f"the system calls of {os.uname().machine} are not known to it"
    try:
        verdict = run_tests("", ["pass"], Limits(seconds=20.0))
    except RuntimeError as error:
        return str(error)
    return None if verdict.passed == 1 else f"a trial run failed: {verdict.error}"


def _settings(folder: str, limits: Limits, unsafe: bool) -> dict[str, Any]:
    python = os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys.executable
    own = [
        sys.base_prefix,
        sys.base_exec_prefix,
        sys.prefix,
        sys.exec_prefix,
        os.path.dirname(os.path.realpath(python)),
    ]
    return {
        "unsafe": unsafe,
        "root": folder,
        "home": HOME,
        "unbuilt": UNBUILT,
        "readable": [*SYSTEM, *own],
        "python": python,
        "harness": (FOLDER / "harness.py").read_text(encoding="utf-8"),
        "user": NOBODY + random.SystemRandom().randrange(NOBODY),
        "cpu_seconds": max(1, round(limits.seconds)),
        "memory": limits.memory_mb << 20,
        "disk": limits.disk_mb << 20,
        "processes": limits.processes,
    }


def _read(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, End]:
    """What the process wrote until it ended, and why it did. Everything it started is gone afterwards."""
    assert process.stdout is not None
    said, end = b"", End.TIME
    look = time.monotonic()
    deadline = look + limits.seconds
    with process.stdout as pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (now := time.monotonic()) < deadline:
            if now >= look:  # whatever it writes meanwhile
                if use_more_than(descendants(process.pid), limits.memory_mb << 20):
                    end = End.MEMORY
                    break
                look = now + INTERVAL
            if selector.select(min(deadline, look) - now):
                said += (part := os.read(pipe.fileno(), LARGEST_VERDICT))
                if not part or len(said) >= LARGEST_VERDICT:
                    end = End.CODE
                    break
        if end is End.CODE and len(said) < LARGEST_VERDICT:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return said, end


def _verdict(said: bytes, seal: str, end: End, code: int, limits: Limits) -> Tally:
    try:
        found = json.loads(said)
        if found["seal"] == seal:
            return Tally(int(found["passed"]), found["error"])
    except (ValueError, KeyError, TypeError):
        pass
    if end is End.TIME:
        return Tally(0, f"not done in {limits.seconds:g} s")
    if end is End.MEMORY:
        return Tally(0, f"its processes together held more than {limits.memory_mb} MB")
    return Tally(0, f"it ended before its tests did ({ending(128 - code if code > 128 else code)})")
