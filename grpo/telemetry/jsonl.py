"""`metrics.jsonl` and `eval.jsonl`: one JSON object per line, synced to disk after each write."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from grpo.alarm import Alarm
from grpo.backend.hub import one_line
from grpo.errors import UserError
from grpo.runs.folder import EVALUATIONS, METRICS
from grpo.types import EvalMetrics, StepMetrics

Record = TypeVar("Record")

INTERVAL = "_interval"
ALARMS = "alarms"

warn = logging.getLogger(__name__).warning


class JsonlLogger:
    """Appends each record to its file in the run's folder.

    Lines that cannot be written (full disk, missing folder) are kept and written with the next successful write.
    Values that are not finite are left out, because JSON cannot represent them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, list[str]] = {METRICS: [], EVALUATIONS: []}

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        line: dict[str, object] = {"step": record.step}
        if isinstance(record, EvalMetrics):
            intervals = {f"{name}{INTERVAL}": list(pair) for name, pair in record.intervals.items()}
            head = {"n": record.n, "grader": record.grader, "failed_gradings": record.failed_gradings}
            line |= {**head, **record.values, **intervals}
        else:
            line |= record.values
        line = {key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
        line |= {ALARMS: [alarm.plain() for alarm in record.alarms]} if record.alarms else {}
        name = EVALUATIONS if isinstance(record, EvalMetrics) else METRICS
        self._waiting[name].append(json.dumps(line) + "\n")
        for name in self._waiting:
            self._flush(name)

    def _flush(self, name: str) -> None:
        lines = self._waiting[name]
        if not lines:
            return
        try:
            _append(self._folder / name, "".join(lines).encode())
        except OSError as error:
            if len(lines) == 1:  # warn once until a write succeeds again
                warn(
                    "%s cannot be written: %s. grpo keeps its lines in memory and tries again",
                    self._folder / name,
                    error.strerror,
                )
        else:
            lines.clear()


def _append(path: Path, data: bytes) -> None:
    """Append all of `data` or nothing, and sync the file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def read_steps(folder: Path) -> list[StepMetrics]:
    """The records of a run's `metrics.jsonl`, without an incomplete last line; empty if there is no file.

    Raises UserError for a line that is not a step's record.
    """
    return _records(folder / METRICS, _step)


def read_evaluations(folder: Path) -> list[EvalMetrics]:
    """The records of a run's `eval.jsonl`. Raises UserError for a line that is not an evaluation's record."""
    return _records(folder / EVALUATIONS, _evaluation)


def _step(line: dict[str, Any]) -> StepMetrics:
    step, alarms = _whole(line.pop("step")), _alarms(line)
    return StepMetrics(step, {name: _number(value) for name, value in line.items()}, alarms=alarms)


def _alarms(line: dict[str, Any]) -> tuple[Alarm, ...]:
    """The alarms of a line, removed from it."""
    return tuple(Alarm(**alarm) for alarm in line.pop(ALARMS, ()))


def _evaluation(line: dict[str, Any]) -> EvalMetrics:
    step, n, grader = _whole(line.pop("step")), _whole(line.pop("n")), line.pop("grader")
    alarms = _alarms(line)
    intervals = {
        name.removesuffix(INTERVAL): (_number(line[name][0]), _number(line[name][1]))
        for name in line
        if name.endswith(INTERVAL)
    }
    failed = _whole(line.get("failed_gradings", 0))  # older records do not have it
    values = {name: _number(line[name]) for name in line if name in intervals}
    return EvalMetrics(step, n, grader, values, intervals, failed, alarms)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _records(path: Path, of: Callable[[dict[str, Any]], Record]) -> list[Record]:
    try:
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(of(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a record that grpo wrote: {one_line(error)}") from None
    return records
