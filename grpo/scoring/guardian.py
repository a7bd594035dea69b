"""Kills worker processes whose trainer is gone, however it went. Run as a script, by the standard library alone.

It reads `+PID` and `-PID` lines: process groups that began and that are over. When its input ends, because the process
at the other end has, it kills those that are left, and with them whatever they started.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
