"""How much memory a process had in RAM at most: all of it, where `GB` is what MLX allocated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from grpo.benchmark.protocol import Values

RESIDENT = "GB resident"


def watch_resident(pid: int | str = "self") -> Callable[[], Values]:
    """Begin to watch a process: what is returned says the peak since then, in GB.

    It says nothing where the system does not let the peak be measured anew: anywhere but on Linux.
    """
    folder = Path("/proc", str(pid))
    try:
        (folder / "clear_refs").write_text("5")  # the peak from now on: proc_pid_clear_refs(5)
    except OSError:
        return dict
    return lambda: _peak(folder)


def _peak(folder: Path) -> Values:
    found = re.search(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
    return {RESIDENT: int(found[1]) * 1024 / 1e9} if found else {}
