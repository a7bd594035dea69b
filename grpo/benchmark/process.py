"""A side that runs in a separate process, because it needs another environment or another BLAS."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.benchmark.protocol import Side, Values
from grpo.benchmark.resident import watch_resident
from grpo.errors import RunError

TOLD = 500
"""Maximum number of characters of a process's last output in an error."""


class Peer:
    """A process that runs once per line of input, and writes a line of JSON with its measurements."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Raises RunError, with the `name`, if the command cannot be run."""
        self.name, self._program = name, command[0]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  it stays open as long as the process runs
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=environment, cwd=folder
            )
        except OSError as error:
            raise RunError(f"{name} by {self._program} failed: {error}") from error

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._errors.close()

    def side(self) -> Side:
        """The process as a side of a comparison."""
        return Side(self.name, self._run)

    def _run(self) -> Values:
        resident = watch_resident(self._process.pid)
        values = self.answer()
        return {**{unit: float(value) for unit, value in values.items()}, **resident()}

    def answer(self, line: str = "") -> Mapping[str, Any]:
        """Send a line, and return the measurements. Raises RunError, with the process's last output, if the answer is
        not a JSON object."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = ""
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            output = self._process.stdout.readline()
            values = json.loads(output)
            if isinstance(values, dict):
                return values
            why = f"it answered {output.strip()[-TOLD:]!r}"
        except BrokenPipeError:
            why = self._said()
        except ValueError as error:
            why = f"{error}: {output.strip()[-TOLD:]!r}" if output else self._said()
        raise RunError(f"{self.name} by {self._program} failed: {why}")

    def _said(self) -> str:
        """The process's last error output, or its exit code if there is no output."""
        self._process.wait()
        self._errors.seek(0)
        return self._errors.read().strip()[-TOLD:] or f"it exited with code {self._process.returncode} without output"
