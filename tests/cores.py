"""The cores of the processes that run the tests. To be imported before anything that starts a thread.

MLX hands each operation from one thread to another, and to wake another core for it takes longer than a toy's operation
does. So where there are as many workers as cores, each keeps to its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_KEPT: list[tuple[int, set[int]]] = []
"""The core that this process keeps to, if it does, and all."""


def _keep_to_one() -> None:
    """Keep this process to one core, if it is one of at least as many workers as there are cores.

    It still counts all cores: lanes and plans are what they are without this.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if sys.platform != "linux" or not worker:
        return
    all_cores = os.sched_getaffinity(0)
    if workers >= len(all_cores) > 1:
        own = sorted(all_cores)[int(worker.removeprefix("gw")) % len(all_cores)]
        os.sched_setaffinity(0, {own})
        os.sched_getaffinity = lambda _: all_cores
        _KEPT.append((own, all_cores))


@contextmanager
def all_of_them() -> Iterator[None]:
    """Let the threads of this process run on all cores inside the block."""
    for _, all_cores in _KEPT:
        _move(all_cores)
    try:
        yield
    finally:
        for own, _ in _KEPT:
            _move({own})


def _move(to: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread), to)


_keep_to_one()
