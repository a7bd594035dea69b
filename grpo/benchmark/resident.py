"""The peak resident memory of a process: all of its RAM, while `GB` counts only MLX's allocations."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from grpo.benchmark.protocol import Values

RESIDENT = "GB resident"


def watch_resident(pid: int | str = "self") -> Callable[[], Values]:
    """Start to watch a process. The returned function gives the peak since then, in GB.

    It returns nothing on other systems than Linux, because they cannot reset the peak.
    """
    folder = Path("/proc", str(pid))
    try:
        (folder / "clear_refs").write_text("5")  # resets the peak: see proc_pid_clear_refs(5)
    except OSError:
        return dict
    return lambda: _peak(folder)


def _peak(folder: Path) -> Values:
    found = re.search(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
    return {RESIDENT: int(found[1]) * 1024 / 1e9} if found else {}
