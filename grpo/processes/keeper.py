"""A process between the trainer and one worker, so that no process that the worker starts outlives it.

Runs as a script, with only the standard library: `keeper.py DESCRIPTOR MEMORY COMMAND...` runs the command in a new
session and passes the descriptor on. Two descriptors, `IN,OUT`, become the command's standard input and output.
The keeper kills the worker and all its descendants when the worker ends, when the keeper's standard input ends (the
trainer closed it, or is gone for any reason), or when they hold more than MEMORY bytes together (0: no limit). On Linux
this includes processes that moved to another session and lost their parent: the keeper adopts them. The keeper exits
like the worker, and reports on standard output if the memory limit was the reason.
"""

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import tree  # type: ignore[import-not-found]

INTERVAL = 0.05
"""Seconds between two measurements of memory."""
PATIENCE = 5.0
"""Seconds to wait until all killed processes are gone. The kernel may hold some back for longer."""


def main() -> None:
    descriptors, limit, command = [int(number) for number in sys.argv[1].split(",")], int(sys.argv[2]), sys.argv[3:]
    tree.adopt_orphans()
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    worker = os.fork()
    if worker == 0:
        _become(command, descriptors)
    for descriptor in descriptors:  # otherwise the trainer would not notice that the worker closed it
        os.close(descriptor)
    status = _watch(worker, limit, woken)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    tree.end_descendants(PATIENCE)
    _end_as(status)


def _become(command: list[str], descriptors: list[int]) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores some of them, which exec inherits
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    tree.die_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if len(descriptors) == 2:
        for standard, descriptor in enumerate(descriptors):
            os.dup2(descriptor, standard)
            os.close(descriptor)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _watch(worker: int, limit: int, woken: int) -> int:
    """Wait until the worker ends, and return its status as in waitpid(2); 0 if it is to be killed."""
    due = 0.0
    while True:
        ready, _, _ = select.select([0, woken], [], [], INTERVAL if limit else None)
        if 0 in ready:
            return 0
        if woken in ready:
            os.read(woken, 4096)
        ended = tree.reap()  # adopted processes, too
        if worker in ended:
            return int(ended[worker])
        if limit and time.monotonic() >= due:  # not on every wake: each `ps` that measures wakes it, too
            if tree.use_more_than(tree.descendants(os.getpid()), limit):
                os.write(1, tree.OVER_MEMORY)
                return 0
            due = time.monotonic() + INTERVAL


def _end_as(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with contextlib.suppress(OSError, ValueError):  # signals that cannot be caught have the default action
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
