"""Rows that are read during the run (`data.streaming`): a run starts immediately, and holds one window of rows."""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from grpo.backend.hub import one_line
from grpo.backend.random import derive_seed
from grpo.config import DataConfig
from grpo.data.prompts import PromptReader
from grpo.data.rows import Names
from grpo.errors import UserError
from grpo.types import Group, Task

log = logging.getLogger(__name__)

SourceRow = Mapping[str, Any]
AT_ONCE = 1000
"""Most rows that are converted together."""
BLOCK, BLOCKS = 2**16, 64
"""Bytes of a block, and number of evenly spaced blocks that are read of a file for its fingerprint."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """Rows in their stored order, which can be read any number of times.

    `opened` returns a `datasets.IterableDataset` of the rows. `files` are the local files, empty for rows on the Hub.
    """

    opened: Callable[[], Any]
    cfg: DataConfig
    files: Sequence[Path] = ()

    def read(self, place: Mapping[str, Any] | None = None, first: int = 0) -> Reading:
        """Read rows from the start, or from a `place` of an earlier reading, where row number `first` is next."""
        return Reading(self, place, first)

    def fingerprint(self) -> str:
        """A hash of the files' sizes and parts of their contents, which include the beginning and the end: 16
        hexadecimal digits. Paths and times do not matter."""
        hashed = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            hashed.update(str(size).encode())
            with path.open("rb") as file:
                for number in range(BLOCKS):
                    file.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
                    hashed.update(file.read(BLOCK))
        return hashed.hexdigest()[:16]


class Reading(Iterator[tuple[int, SourceRow]]):
    """One pass over streamed rows, each with its number."""

    def __init__(self, rows: Streamed, place: Mapping[str, Any] | None, first: int) -> None:
        self._label, self._cfg, self.number = rows.cfg.label, rows.cfg, first
        self._dataset = rows.opened().with_format("arrow")
        self._dataset.load_state_dict(place or {})
        # Reading many rows together is 30 times as fast. A window must end at the end of such a batch.
        tables = self._dataset.iter(batch_size=math.gcd(rows.cfg.window, AT_ONCE))
        self._rows = (row for table in tables for row in table.to_pylist())
        self._begun, self._place = False, place
        self._names: Names | None = None

    @property
    def place(self) -> Any:
        """The next row's place, as JSON, for `Streamed.read`. Valid only between two windows. None at the start."""
        return self._dataset.state_dict() if self._begun else self._place

    def __next__(self) -> tuple[int, SourceRow]:
        """Raises UserError for a row that cannot be read, and for a missing column of `data.columns`."""
        self._begun = True
        try:
            row = next(self._rows)
        except (StopIteration, KeyboardInterrupt):
            raise
        except Exception as error:  # readers raise many kinds of errors, all about the rows
            raise UserError(
                f"data {self._label}: cannot be read from row {self.number:,} on: {one_line(error.__cause__ or error)}"
            ) from error
        number = self.number
        self.number += 1
        if self._names is None:
            self._names = Names.of(self._cfg, row)
        return number, self._names.added(number, row)


class WindowStream:
    """The `Source` of streamed rows: an endless sequence of tasks, epoch after epoch.

    Each window of `data.window` consecutive rows is shuffled separately, by the seed, the epoch and the window's number
    (with `data.shuffle: false` the rows keep their order). So a resumed run needs only the place where a window begins,
    and the position in it: it reads that window again.
    """

    def __init__(self, rows: Streamed, reader: PromptReader, seed: int) -> None:
        self._rows, self._reader, self._seed = rows, reader, seed
        self._size = reader.cfg.window
        self._of = {"window": self._size, "rows": rows.fingerprint()}
        self.dropped = 0
        self._begin(0, 0, None, 0)

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks. Raises UserError if two consecutive windows have no prompt that fits."""
        tasks: list[Task] = []
        misses = 0
        while len(tasks) < n:
            task = self._reader.task(*self._next())
            if task is not None and self._reader.fits(task):
                tasks.append(task)
                misses = 0
                continue
            self.dropped += 1
            misses += 1
            if misses >= 2 * self._size:
                raise none_fit(self._reader, misses)
        return tasks

    def observe(self, groups: Sequence[Group]) -> None:
        """No-op: the order of the rows does not depend on their results."""

    def metrics(self) -> dict[str, float]:
        """The number of dropped rows, and the number of finished epochs. (The number of rows is unknown.)"""
        return {"dropped_prompts": float(self.dropped), "epoch": float(self._epoch)}

    def state(self) -> dict[str, Any]:
        """The epoch, the window's number, first row and place, the number of rows taken from it, and a description of
        the rows and the window size."""
        return {
            "of": self._of,
            "epoch": self._epoch,
            "window": self._number,
            "place": self._place,
            "first": self._first,
            "taken": self._taken,
            "dropped": self.dropped,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a stream with the same rows and seed. Starts at the beginning after another kind of
        source. If the rows or the window size have changed, the epoch begins again, because the place is invalid."""
        self.dropped = state.get("dropped", 0)
        known = state if "window" in state else {}
        if others := [name for name, value in self._of.items() if known and known["of"].get(name) != value]:
            log.warning(
                "data.streaming: epoch %d begins again, because the checkpoint was written with another %s",
                known["epoch"],
                " and ".join({"window": "data.window", "rows": "file"}[name] for name in others),
            )
            known = {"epoch": known["epoch"]}
        self._begin(known.get("epoch", 0), known.get("window", 0), known.get("place"), known.get("first", 0))
        self._taken = known.get("taken", 0)

    def _begin(self, epoch: int, number: int, place: Any, first: int) -> None:
        """Go to the beginning of a window, which is read later, on demand."""
        self._epoch, self._number, self._place, self._first, self._taken = epoch, number, place, first, 0
        self._window: list[tuple[int, SourceRow]] | None = None
        self._reading: Reading | None = None

    def _next(self) -> tuple[int, SourceRow]:
        """The next row, with its number."""
        if self._window is None:
            self._window = self._read()
        while self._taken >= len(self._window):  # greater if the Hub now has fewer rows than before
            if self._window:
                assert self._reading is not None
                self._number, self._taken = self._number + 1, 0
                self._place, self._first = self._reading.place, self._reading.number
            elif self._first:
                self._begin(self._epoch + 1, 0, None, 0)
            else:
                raise UserError(f"data {self._reader.cfg.label}: split {self._reader.cfg.split!r} has no rows")
            self._window = self._read()
        self._taken += 1
        row: tuple[int, SourceRow] = self._window[self._taken - 1]
        return row

    def _read(self) -> list[tuple[int, SourceRow]]:
        """The rows of this window, shuffled; empty at the end of the epoch."""
        if self._reading is None:
            self._reading = self._rows.read(self._place, self._first)
        window = list(islice(self._reading, self._size))
        if self._reader.cfg.shuffle:
            random.Random(derive_seed(self._seed, "window", self._epoch, self._number)).shuffle(window)
        return window


def first_streamed(rows: Streamed, reader: PromptReader, n: int, most: int | None = None) -> list[Task]:
    """The first `n` tasks in the rows' stored order, without prompts that are too long or null. Reads at most `most`
    rows. Raises UserError if there is no task."""
    tasks: list[Task] = []
    read = 0
    for number, row in islice(rows.read(), most):
        read += 1
        task = reader.task(number, row)
        if task is not None and reader.fits(task):
            tasks.append(task)
        if len(tasks) == n:
            break
    if not read:
        raise UserError(f"data {reader.cfg.label}: split {reader.cfg.split!r} has no rows")
    if not tasks:
        raise none_fit(reader, read)
    return tasks


def none_fit(reader: PromptReader, rows: int) -> UserError:
    """The error for this many consecutive rows without a prompt that fits."""
    return UserError(
        f"data {reader.cfg.label}: {rows:,} consecutive rows have a prompt that is null or longer than "
        f"max_prompt_length ({reader.cfg.max_prompt_length} tokens)"
    )
