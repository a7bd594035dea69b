"""A side that runs in a process of its own, because it needs another environment or another BLAS."""

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
"""Characters of what a process said last that an error repeats."""


class Peer:
    """A process that works once for each line that it is sent, and answers with a line of JSON: what it measured."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Raises RunError, with the `name`, where the command cannot be run."""
        self.name, self._program = name, command[0]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
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
        """Its work once, held against others'."""
        return Side(self.name, self._run)

    def _run(self) -> Values:
        resident = watch_resident(self._process.pid)
        values = self.answer()
        return {**{unit: float(value) for unit, value in values.items()}, **resident()}

    def answer(self, line: str = "") -> Mapping[str, Any]:
        """Send a line, and return what the process measured. Raises RunError, with what the process said last, where it
        has not measured anything."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        told = ""
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            told = self._process.stdout.readline()
            values = json.loads(told)
            if isinstance(values, dict):
                return values
            why = f"it answered {told.strip()[-TOLD:]!r}"
        except BrokenPipeError:
            why = self._said()
        except ValueError as error:
            why = f"{error}: {told.strip()[-TOLD:]!r}" if told else self._said()
        raise RunError(f"{self.name} by {self._program} failed: {why}")

    def _said(self) -> str:
        """Why it has ended, as far as it said so."""
        self._process.wait()
        self._errors.seek(0)
        return self._errors.read().strip()[-TOLD:] or f"it ended with code {self._process.returncode}, without a word"
