"""What a launcher made of this process, and how long it waits for its fellows."""

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
"""Variables by which launchers say which process this is."""
PATIENCE = 1800.0
"""Seconds a process waits for the others before it ends the run, if nobody has said how many."""
CHOSEN = "GRPO_RANK_TIMEOUT"
"""The variable that says how many."""
CLOCK = """
import os, select, sys
seconds, pid, line = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    print(line, file=sys.stderr, flush=True)
    os.kill(int(pid), 9)
"""
"""A process that ends another after some time, unless that closes its end of a pipe before, or ends by itself."""


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """End this process if a block takes longer: MLX waits for ever for a process that never starts, and lets no thread
    of Python's have its turn meanwhile."""
    line = (
        f"grpo: process {os.environ.get('MLX_RANK', '')} waited {seconds:.0f} s for the others to start: one of them "
        "has not, or cannot be reached. `grpo doctor --ranks --hostfile FILE` looks for what is wrong with the hosts."
    )
    command = [sys.executable, "-S", "-c", CLOCK, str(seconds), str(os.getpid()), line]
    with subprocess.Popen(command, stdin=subprocess.PIPE):  # its end closes the pipe
        yield


def patience() -> float:
    """Seconds to wait for others. Raises UserError for what is no number of seconds."""
    said = os.environ.get(CHOSEN, str(PATIENCE))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UserError(f"{CHOSEN}: {said!r} is no number of seconds above 0")
    return seconds


def launched_alone() -> bool:
    """Whether `mlx.launch` was asked for a single process: its list of hosts is then an empty file."""
    hosts = os.environ.get("MLX_HOSTFILE")
    return hosts is not None and os.path.isfile(hosts) and not Path(hosts).read_text().strip()
