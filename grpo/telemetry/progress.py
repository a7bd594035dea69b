"""How far the phase is that a run is in: in words, and in a file for those who follow from another terminal."""

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
"""Seconds between two writes of the file."""


@dataclass(slots=True)
class Phase:
    """A phase: its name, how much was done when it was first heard of, when that was (seconds), and how much is now."""

    name: str
    first: int
    began: float
    done: int = 0

    def goes_on(self, name: str, done: int) -> bool:
        """Whether a report is of this phase, and not of another or of its next time."""
        return name == self.name and done >= self.done

    def report(self, done: int, total: int, now: float, rows: RowCounts | None = None) -> list[str]:
        """How far it is, in words, the most important first, with the speed since it was first heard of."""
        self.done = done
        unit = UNITS.get(self.name, "")
        if unit != "tokens":
            return [f"{done:,} of {total:,} {unit}".rstrip()]
        seconds = now - self.began
        bound = f" of at most {total:,}" if done < total and rows is None else ""
        parts = [f"{done:,}{bound} tokens", *_of_rows(rows)]
        return [*parts, f"{(done - self.first) / seconds:,.0f} tok/s"] if seconds > 0 else parts


def _of_rows(rows: RowCounts | None) -> list[str]:
    """The rows that have ended; and where the model had several turns, how many they have begun in the mean."""
    if rows is None:
        return []
    turns = [f"{rows.turns / rows.rows:.1f} turns a row"] if rows.turns > rows.rows else []
    return [f"{rows.ended:,} of {rows.rows:,} rows", *turns]


def in_words(name: str, done: int, total: int, rows: RowCounts | None = None) -> str:
    """How far a phase is, in one line and without a speed."""
    return f"{name}: {', '.join(Phase(name, done, 0.0).report(done, total, 0.0, rows))}"


class NowFile:
    """Writes the phase into the run's folder, now and then."""

    def __init__(self, folder: Path) -> None:
        self._path, self._written, self._phase = folder / NOW, 0.0, ""

    def progress(self, phase: str, done: int, total: int, rows: RowCounts | None = None) -> None:
        """Note how far a phase is: at once if it is a new one."""
        now = time.monotonic()
        if phase == self._phase and now - self._written < WRITE_EVERY:
            return
        self._phase, self._written = phase, now
        with suppress(OSError):  # nobody's loss: the folder may be gone, or full
            self._path.write_text(json.dumps([phase, done, total, rows]), encoding="utf-8")

    def close(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_now(folder: Path) -> tuple[str, int, int, RowCounts | None] | None:
    """The phase that a run says it is in, if it does: the arguments of `Progress`."""
    try:  # it may be being written
        phase, done, total, rows = json.loads((folder / NOW).read_text(encoding="utf-8"))
        return str(phase), int(done), int(total), RowCounts(*map(int, rows)) if rows is not None else None
    except (OSError, ValueError, TypeError):
        return None
