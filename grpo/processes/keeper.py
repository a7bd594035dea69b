"""Stands between the trainer and one worker process, and sees to it that nothing which that one starts outlives it.

Run as a script, by the standard library alone: `keeper.py DESCRIPTOR MEMORY COMMAND...` runs the command, with the
descriptor, in a session of its own; of two descriptors, `IN,OUT`, it makes the command's standard input and output.
When that process ends, when standard input does (the trainer has closed it, or is gone, however it went), or when
everything below it holds more than MEMORY bytes (0: no limit), all of it is killed. On Linux that includes processes
that have moved into another session and lost their parent: they are adopted here. The keeper ends as the worker did,
and says on standard output if memory was why.
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
"""Seconds between two looks at the memory."""
PATIENCE = 5.0
"""Seconds for all to be gone: what the kernel holds back for longer is not waited for."""


def main() -> None:
    descriptors, limit, command = [int(one) for one in sys.argv[1].split(",")], int(sys.argv[2]), sys.argv[3:]
    tree.adopt_orphans()
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    worker = os.fork()
    if worker == 0:
        _become(command, descriptors)
    for descriptor in descriptors:  # or the trainer would not see it closed by the worker
        os.close(descriptor)
    status = _watch(worker, limit, woken)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    tree.end_descendants(PATIENCE)
    _end_as(status)


def _become(command: list[str], descriptors: list[int]) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores some, and that is inherited
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
    """How the worker ended, as waitpid(2) has it; 0 if it is to be ended."""
    due = 0.0
    while True:
        ready, _, _ = select.select([0, woken], [], [], INTERVAL if limit else None)
        if 0 in ready:
            return 0
        if woken in ready:
            os.read(woken, 4096)
        ended = tree.reap()  # those that were adopted among them
        if worker in ended:
            return int(ended[worker])
        if limit and time.monotonic() >= due:  # not at once again when woken: `ps`, where it is asked, wakes, too
            if tree.use_more_than(tree.descendants(os.getpid()), limit):
                os.write(1, tree.OVER_MEMORY)
                return 0
            due = time.monotonic() + INTERVAL


def _end_as(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with contextlib.suppress(OSError, ValueError):  # those that cannot be caught are as they are
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
