"""Messages that say how a child process ended without an answer."""

from __future__ import annotations

import time

from grpo.processes.child import ChildProcess, ending
from grpo.processes.output import Output


def killed(process: ChildProcess, seconds: float, when: str) -> str:
    """Kill a process that has not answered in `seconds`. Returns the message."""
    process.kill()
    return f"no answer in {seconds:g} s {when}, so its process was killed"


def ended(
    process: ChildProcess, output: Output, error: Exception, when: str, memory_gb: float | None
) -> tuple[bool, str]:
    """Whether the memory limit ended a process, and a message that says how it ended. Kills what is left of it.

    `error` is the exception from reading its next message.
    """
    gone = isinstance(error, ConnectionError | EOFError)
    code, out_of_memory = process.end(1.0 if gone else 0.0)  # a process that sends nonsense is not about to end
    if out_of_memory:
        return True, f"it used more than memory_gb ({memory_gb:g}) {when}, so its process was killed"
    time.sleep(0.02)  # for its last output to arrive
    if gone and code is not None:
        return False, f"its process ended {when} ({ending(code)}){output.tail()}"
    return False, f"its process sent an invalid message {when} ({type(error).__name__}: {error})"
