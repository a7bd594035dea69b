"""Whether a launcher started this process as one of several, and how long the process waits for the others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.errors import UserError

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables that hold this process's number, set by launchers."""
PATIENCE = 1800.0
"""Seconds that a process waits for the others before it ends the run, unless the variable `CHOSEN` is set."""
CHOSEN = "GRPO_RANK_TIMEOUT"
"""The environment variable that sets these seconds."""
CLOCK = """
import os, select, sys
seconds, pid, line = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    print(line, file=sys.stderr, flush=True)
    os.kill(int(pid), 9)
"""
"""Script of a process that kills another process after some time, unless that closes its end of a pipe or exits."""


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """Kill this process if the block takes longer. MLX waits forever for a process that never starts, and meanwhile no
    Python thread can run."""
    line = (
        f"grpo: process {os.environ.get('MLX_RANK', '')} waited {seconds:.0f} s for the others to start: one of them "
        "has not started, or cannot be reached. `grpo doctor --ranks --hostfile FILE` checks the hosts."
    )
    command = [sys.executable, "-S", "-c", CLOCK, str(seconds), str(os.getpid()), line]
    with subprocess.Popen(command, stdin=subprocess.PIPE):  # leaving the block closes the pipe
        yield


def patience() -> float:
    """Seconds to wait for other processes. Raises UserError if the variable is not a number of seconds."""
    value = os.environ.get(CHOSEN, str(PATIENCE))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UserError(f"{CHOSEN}: {value!r} is not a number of seconds above 0")
    return seconds


def launched_alone() -> bool:
    """Whether `mlx.launch` started a single process: its list of hosts is then an empty file."""
    hosts = os.environ.get("MLX_HOSTFILE")
    return hosts is not None and os.path.isfile(hosts) and not Path(hosts).read_text().strip()
