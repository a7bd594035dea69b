"""Runs a Python script in a child process, which ends with all its descendants when this process closes it or ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.processes.output import Output
from grpo.processes.tree import OVER_MEMORY

if TYPE_CHECKING:  # the sandbox imports this file
    from grpo.processes.sandbox.worker import Sandbox

KEEPER_SECONDS = 10.0
"""Seconds for a keeper to end, with all its descendants."""


class ChildProcess:
    """A running Python script, started by a keeper, and a channel to it."""

    def __init__(
        self,
        script: Path,
        output: Output,
        environment: Mapping[str, str],
        memory_gb: float | None,
        sandbox: Sandbox | None = None,
    ) -> None:
        """Start `script DESCRIPTOR ROOT`: the descriptor of the script's end of `channel`, and this package's folder.

        In a `sandbox`, the script can read what the sandbox shows, and write to its home folder there.
        """
        self.channel, far_end = socket.socketpair()
        root = str(Path(__file__).parents[2])
        memory = 0 if memory_gb is None else round(memory_gb * 2**30)
        with far_end:
            channel = str(far_end.fileno())
            keeper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")), channel, str(memory)]
            command, folder = [sys.executable, *(arguments := ["-P", str(script), channel, root])], None
            if sandbox is not None:
                folder = tempfile.TemporaryDirectory(prefix="grpo-sandbox-", ignore_cleanup_errors=True)
                command, environment = sandbox.command(arguments, folder.name), sandbox.environment(environment)
            self._popen = subprocess.Popen(
                [*keeper, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output.descriptor,
                pass_fds=[far_end.fileno()],
                env=environment,
                start_new_session=True,
            )
        self.pid = self._popen.pid
        self.kill = weakref.finalize(self, _kill, self._popen, self.channel, folder)

    def end(self, seconds: float) -> tuple[int | None, bool]:
        """The exit code (None if the process did not end in `seconds` and was killed), and whether memory ended it."""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._popen.wait(seconds)
        assert self._popen.stdout is not None
        word = self._popen.stdout.read() if code is not None else b""
        self.kill()
        return code, word == OVER_MEMORY


def _kill(
    popen: subprocess.Popen[bytes], channel: socket.socket, folder: tempfile.TemporaryDirectory[str] | None
) -> None:
    """Make the keeper kill its worker and all descendants, and wait for it."""
    assert popen.stdin is not None
    assert popen.stdout is not None
    popen.stdin.close()
    try:
        popen.wait(KEEPER_SECONDS)
    except subprocess.TimeoutExpired:  # the keeper itself was stopped
        popen.kill()
        popen.wait()
    popen.stdout.close()
    channel.close()
    if folder is not None:
        folder.cleanup()


def ending(code: int) -> str:
    """A phrase for an exit code (negative: the signal that killed the process)."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
