"""Finds, measures and ends the descendants of a process.

Uses only the standard library, because scripts import it too. Reads /proc on Linux, and calls `ps` elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PAGE = os.sysconf("SC_PAGE_SIZE")
OVER_MEMORY = b"memory"
"""A keeper's message after it ended processes because of their memory."""


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its parent, so that none escapes. Only on Linux.

    See PR_SET_CHILD_SUBREAPER in prctl(2).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Have this process killed when its parent ends, for any reason. Only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and their descendants, parents first. Includes zombies."""
    parents = None if _has_children_files() else _parents()
    found = [pid]
    for above in found:  # the list grows during the loop
        found += (
            _children(above) if parents is None else [child for child, parent in parents.items() if parent == above]
        )
    return found[1:]


def use_more_than(pids: Iterable[int], limit: int) -> bool:
    """Whether the processes together hold more than `limit` bytes of memory. Shared memory counts once."""
    pids = list(pids)
    if sum(map(_resident, pids)) <= limit:  # this upper bound counts shared pages once per process
        return False
    return sum(map(_proportional, pids)) > limit


def end(pid: int) -> None:
    """Kill a process, if it exists and this user may kill it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def end_descendants(seconds: float) -> None:
    """Kill and reap all descendants of this process, for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            end(pid)
        time.sleep(0.001)
        reap()


def reap() -> dict[int, int]:
    """Reap the children that have ended. Returns their wait statuses by process id."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (reaped := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            ended[reaped[0]] = reaped[1]
    return ended


def _has_children_files() -> bool:
    return Path(f"/proc/self/task/{os.getpid()}/children").exists()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # the process has ended meanwhile
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def _parents() -> dict[int, int]:
    return {int(pid): int(parent) for pid, parent in map(str.split, _ps("-axo", "pid=,ppid=").splitlines())}


def _ps(*arguments: str) -> str:
    """The output of `ps`, without the lines about itself."""
    import subprocess

    with subprocess.Popen(["ps", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as ps:
        text = ps.communicate()[0]
    return "".join(line for line in text.splitlines(keepends=True) if line.split()[:1] != [str(ps.pid)])


def _resident(pid: int) -> int:
    """Bytes of a process's resident memory; 0 if it has ended."""
    if not _has_children_files():
        return int(_ps("-o", "rss=", "-p", str(pid)).strip() or 0) * 1024
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def _proportional(pid: int) -> int:
    """Bytes of a process's memory, with its share of shared pages; resident bytes if the kernel does not report it."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _resident(pid)
