"""The output of worker processes: the beginning is shown, and no amount of output can block anything."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque

from grpo.backend.secrets import masked

SHOWN = 8192
"""Most bytes of a reward's output that are shown per scoring."""
TAIL = 600
"""Characters of a dead worker's last output that are quoted in its error."""
LAST_SECONDS = 1.0
"""Seconds that `close` waits for the rest of the pipe. A process that outlives the worker may hold the pipe open."""


class Output:
    """A pipe for a worker's standard output and error, and a thread that empties it.

    `descriptor` is the end to write to. It outlives the worker: a replacement worker gets the same descriptor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._ours, self.descriptor = os.pipe()
        self._shown, self._left_out = 0, 0
        self._last: deque[bytes] = deque(maxlen=4)
        self._said: set[bytes] = set()
        self._repeats = 0
        self._thread = threading.Thread(target=self._empty, name=f"output of {name}", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Begin a new scoring: report what was not shown of the previous one, and reset the limit."""
        self._say_repeats()
        self._said.clear()
        if self._left_out:
            print(f"[{self.name}] printed {self._left_out:,} more bytes, not shown", file=sys.stderr)
        self._shown, self._left_out = 0, 0

    def tail(self) -> str:
        """The last output, as a suffix for an error message."""
        text = b"".join(self._last).decode(errors="replace").strip()[-TAIL:]
        return f"; it said: {text}" if text else ""

    def close(self, seconds: float = LAST_SECONDS) -> None:
        """Show the rest of the output. Waits at most `seconds`, because a worker that has not ended holds the pipe."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)
        self.descriptor = -1
        if threading.current_thread() is not self._thread:  # a finalizer runs in any thread
            self._thread.join(seconds)
        self._say_repeats()

    def _empty(self) -> None:
        partial = b""
        with os.fdopen(self._ours, "rb", buffering=0) as pipe:
            while part := pipe.read(1 << 16):
                self._last.append(part[-TAIL:])
                show = part[: max(0, SHOWN - self._shown)]
                self._shown += len(show)
                self._left_out += len(part) - len(show)
                *lines, partial = (partial + show).split(b"\n")
                if len(partial) >= SHOWN:
                    lines, partial = [*lines, partial], b""
                for line in lines:
                    self._say(line)

    def _say(self, line: bytes) -> None:
        """Show a line once per scoring. Repeats, which are common with many processes, are only counted."""
        if line in self._said:
            self._repeats += 1
            return
        if line:
            self._said.add(line)
        print(f"[{self.name}] {masked(line.decode(errors='replace'))}", file=sys.stderr)

    def _say_repeats(self) -> None:
        repeats, self._repeats = self._repeats, 0
        if repeats:
            lines = "line" if repeats == 1 else "lines"
            print(f"[{self.name}] ({repeats:,} more {lines}, the same as above)", file=sys.stderr)
