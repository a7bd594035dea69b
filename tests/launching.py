"""Several processes on one machine, by mlx.launch and the ring backend, for tests."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import cores

TESTS = Path(__file__).parent
LAUNCH = Path(sys.executable).with_name("mlx.launch")


def free_ports(n: int) -> int:
    """The first of `n` ports in a row that nobody listens at.

    The launcher's own are always the same, and processes of two launches at once would connect to each other.
    """
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + n):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def launch(n: int, *command: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(TESTS / "training"), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    passed = {"PYTHONPATH": paths, "MKL_NUM_THREADS": "1", **environment}
    settings = [argument for name, value in passed.items() for argument in ("--env", f"{name}={value}")]
    backend = ["--backend", "ring", "--starting-port", str(free_ports(n))]
    with cores.all_of_them():  # a process that waits for another does so by asking again and again
        return subprocess.run(
            [LAUNCH, "-n", str(n), *backend, *settings, "--", sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": paths},
        )
