"""Runs code against tests in the sandbox, once per call, and returns a verdict."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.processes.child import ending
from grpo.processes.sandbox.cell import HOME, UNBUILT, Cell, End, Limits

HARNESS = Path(__file__).with_name("harness.py")
LARGEST_VERDICT = 1 << 16


@dataclass(frozen=True, slots=True)
class Tally:
    """The number of passed tests, and the first error."""

    passed: int
    error: str | None


def run_tests(code: str, tests: Sequence[Any], limits: Limits, unsafe: bool = False) -> Tally:
    """Run `code`, then its `tests`: code that raises if it fails, or `{input, output}` for a program.

    Raises RuntimeError if the sandbox cannot be built. With `unsafe` there is no sandbox, only limits.
    """
    seal = secrets.token_hex(16)
    job = json.dumps({"seal": seal, "code": code, "tests": list(tests)}).encode()
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as complaints:
        given.write(job)
        given.seek(0)
        arguments = ["-I", "-B", "-c", HARNESS.read_text(encoding="utf-8")]
        cell = Cell(arguments, limits, unsafe, given.fileno(), complaints.fileno())
        try:
            said, end = _said(cell, limits)
        finally:
            cell.end()
        complaints.seek(0)
        why = complaints.read(1000).decode(errors="replace").strip()
    if cell.process.returncode == UNBUILT and why:  # the code under test cannot write to `complaints`
        raise RuntimeError(f"the sandbox cannot be built: {why}")
    return _verdict(said, seal, end, cell.process.returncode, limits)


def _said(cell: Cell, limits: Limits) -> tuple[bytes, End]:
    """The output of a cell until it ends, and the reason for its end."""
    assert cell.process.stdout is not None
    said, deadline = bytearray(), time.monotonic() + limits.seconds

    def reader(part: bytes) -> bool:
        said.extend(part)
        return not part or len(said) >= LARGEST_VERDICT

    end = cell.watch({cell.process.stdout.fileno(): reader})
    if end is End.CODE and len(said) < LARGEST_VERDICT:
        with contextlib.suppress(subprocess.TimeoutExpired):
            cell.process.wait(max(0.0, deadline - time.monotonic()))
    return bytes(said), end


@functools.cache
def missing() -> str | None:
    """The reason why sandboxes do not work on this machine, or None."""
    if sys.platform != "linux":
        return f"grpo isolates code only on Linux, not yet on {sys.platform}"
    if os.uname().machine not in ("x86_64", "aarch64"):
        return f"grpo does not know the system calls of {os.uname().machine}"
    if os.environ.get("HOME") == HOME and not os.path.exists("/proc"):
        return "this process already runs in a sandbox, where the kernel does not allow another one"
    try:
        verdict = run_tests("", ["pass"], Limits(seconds=20.0))
    except RuntimeError as error:
        return str(error)
    return None if verdict.passed == 1 else f"a trial run failed: {verdict.error}"


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
    return Tally(0, f"its process ended before the tests finished ({ending(128 - code if code > 128 else code)})")
