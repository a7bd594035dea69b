"""The progress of a run's current phase: as text, and in a file for `grpo runs --follow` and `grpo watch`."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grpo.progress import RowCounts
from grpo.runs.folder import NOW

UNITS = {"rollout": "tokens", "evaluation": "tokens", "reward": "completions", "update": "micro-batches"}
WRITE_EVERY = 2.0
"""Minimum number of seconds between two writes of the file in one phase."""


@dataclass(slots=True)
class Phase:
    """A phase of a step.

    `first` is the amount done at the first report, `began` the time of the first report in seconds, `done` the amount
    done at the latest report.
    """

    name: str
    first: int
    began: float
    done: int = 0

    def goes_on(self, name: str, done: int) -> bool:
        """Whether a report continues this phase, rather than another phase or a repetition of this one."""
        return name == self.name and done >= self.done

    def report(self, done: int, total: int, now: float, rows: RowCounts | None = None) -> list[str]:
        """The progress as text parts, most important first, with the speed since the first report."""
        self.done = done
        unit = UNITS.get(self.name, "")
        if unit != "tokens":
            return [f"{done:,} of {total:,} {unit}".rstrip()]
        seconds = now - self.began
        bound = f" of at most {total:,}" if done < total and rows is None else ""
        parts = [f"{done:,}{bound} tokens", *_of_rows(rows)]
        return [*parts, f"{(done - self.first) / seconds:,.0f} tok/s"] if seconds > 0 else parts


def _of_rows(rows: RowCounts | None) -> list[str]:
    """The number of finished rows and, if rows have several turns, the mean number of turns that they have begun."""
    if rows is None:
        return []
    turns = [f"{rows.turns / rows.rows:.1f} turns a row"] if rows.turns > rows.rows else []
    return [f"{rows.ended:,} of {rows.rows:,} rows", *turns]


def in_words(name: str, done: int, total: int, rows: RowCounts | None = None) -> str:
    """The progress of a phase on one line, without a speed."""
    return f"{name}: {', '.join(Phase(name, done, 0.0).report(done, total, 0.0, rows))}"


class NowFile:
    """Writes the progress of the current phase into the run's folder, at most every `WRITE_EVERY` seconds."""

    def __init__(self, folder: Path) -> None:
        self._path, self._written, self._phase = folder / NOW, 0.0, ""

    def progress(self, phase: str, done: int, total: int, rows: RowCounts | None = None) -> None:
        """Write the progress of a phase: immediately if the phase is new."""
        now = time.monotonic()
        if phase == self._phase and now - self._written < WRITE_EVERY:
            return
        self._phase, self._written = phase, now
        with suppress(OSError):  # the file is optional, and the folder may be missing or the disk full
            self._path.write_text(json.dumps([phase, done, total, rows]), encoding="utf-8")

    def close(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_now(folder: Path) -> tuple[str, int, int, RowCounts | None] | None:
    """The current phase in a run's file, as arguments of `Progress`; None without a readable file."""
    try:  # the run may be writing the file right now
        phase, done, total, rows = json.loads((folder / NOW).read_text(encoding="utf-8"))
        return str(phase), int(done), int(total), RowCounts(*map(int, rows)) if rows is not None else None
    except (OSError, ValueError, TypeError):
        return None
