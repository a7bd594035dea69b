"""The processes that a process has started: found, measured, ended.

Scripts use this too: by the standard library alone. On Linux from /proc, elsewhere from `ps`.
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
"""What a keeper says of processes that it ended for the memory that they took."""


def adopt_orphans() -> None:
    """Become the parent of each descendant that loses its own: none gets away by it. On Linux; elsewhere not so.

    See PR_SET_CHILD_SUBREAPER in prctl(2).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Be killed when the parent is gone, however it went. On Linux; elsewhere not so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` has started, and those that they have, parents first; zombies are among them."""
    parents = None if _has_children_files() else _parents()
    found = [pid]
    for above in found:  # it grows on the way
        found += (
            _children(above) if parents is None else [child for child, parent in parents.items() if parent == above]
        )
    return found[1:]


def use_more_than(pids: Iterable[int], limit: int) -> bool:
    """Whether the processes together hold more than `limit` bytes of memory; what they share counts once."""
    pids = list(pids)
    if sum(map(_resident, pids)) <= limit:  # in which shared pages count for each
        return False
    return sum(map(_proportional, pids)) > limit


def end(pid: int) -> None:
    """Kill a process, if it is there and ours to kill."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def end_descendants(seconds: float) -> None:
    """Kill all that this process has started, and reap it; in `seconds` what can be killed is gone."""
    deadline = time.monotonic() + seconds
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            end(pid)
        time.sleep(0.001)
        reap()


def reap() -> dict[int, int]:
    """The children that have ended, with how."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (reaped := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            ended[reaped[0]] = reaped[1]
    return ended


def _has_children_files() -> bool:
    return Path(f"/proc/self/task/{os.getpid()}/children").exists()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def _parents() -> dict[int, int]:
    return {int(pid): int(parent) for pid, parent in map(str.split, _ps("-axo", "pid=,ppid=").splitlines())}


def _ps(*arguments: str) -> str:
    """What `ps` says, without the lines about itself."""
    import subprocess

    with subprocess.Popen(["ps", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as ps:
        said = ps.communicate()[0]
    return "".join(line for line in said.splitlines(keepends=True) if line.split()[:1] != [str(ps.pid)])


def _resident(pid: int) -> int:
    """Bytes that a process holds in memory; 0 when it has ended."""
    if not _has_children_files():
        return int(_ps("-o", "rss=", "-p", str(pid)).strip() or 0) * 1024
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def _proportional(pid: int) -> int:
    """Bytes, with a share of what it shares with others; where the kernel does not say, all of what it holds."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _resident(pid)
