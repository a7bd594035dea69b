"""Files of solve rates: how often a model solved each task of a data set. `grpo eval --solve-rates` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import DataConfig
from grpo.data.fingerprint import fingerprint
from grpo.data.rows import Renamed, Rows
from grpo.errors import UserError


@dataclass(frozen=True, slots=True)
class SolveRates:
    """The solve rates of tasks, by row, and the rows that they are of: how many, and their fingerprint.

    `about` says in the file what else they are of: data, split, model, reward, samples.
    """

    rates: Mapping[int, float]
    rows: int
    fingerprint: str
    about: Mapping[str, Any]

    @classmethod
    def of(cls, rates: Mapping[int, float], rows: Rows, about: Mapping[str, Any]) -> SolveRates:
        """Rates of these rows."""
        rows = _plain(rows)
        return cls(rates, len(rows), fingerprint(rows), about)

    def write(self, path: Path) -> None:
        """A line of JSON about the rows, then a line for each task. Raises OSError where it cannot be written."""
        head = {**self.about, "rows": self.rows, "fingerprint": self.fingerprint}
        lines = [head, *({"index": index, "solve_rate": rate} for index, rate in sorted(self.rates.items()))]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> SolveRates:
        """What `write` wrote. Raises UserError for a file that is not there, or is none of these."""
        place = "its first line"
        try:
            with path.expanduser().open(encoding="utf-8") as file:
                about = json.loads(next(file))
                rows, print_ = int(about.pop("rows")), str(about.pop("fingerprint"))
                rates: dict[int, float] = {}
                for number, line in enumerate(file, start=2):
                    place = f"line {number}"
                    entry = json.loads(line)
                    rates[_within(int(entry["index"]), 0, rows - 1)] = _within(float(entry["solve_rate"]), 0.0, 1.0)
        except OSError as error:
            raise UserError(f"data.solve_rates {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise UserError(
                f"data.solve_rates {path}: {place} is not what grpo eval --solve-rates writes: first a line with "
                'rows and fingerprint, then lines of {"index": 0, "solve_rate": 0.5} with rates from 0 to 1'
            ) from error
        return cls(rates, rows, print_, about)

    def check(self, rows: Rows, cfg: DataConfig) -> None:
        """Raise UserError unless these rates are of `rows`."""
        rows = _plain(rows)
        if self.rows != len(rows) or self.fingerprint != fingerprint(rows):
            was = f"{self.about.get('data', 'other data')}, split {self.about.get('split', '?')}: {self.rows:,} rows"
            raise UserError(
                f"data.solve_rates {cfg.solve_rates}: these rates are of other rows ({was}) than data {cfg.label}, "
                f"split {cfg.split} ({len(rows):,} rows). Measure these: grpo eval RECIPE --split {cfg.split} "
                f"--prompts {len(rows)} --solve-rates FILE"
            )

    def between(self, low: float, high: float) -> list[int]:
        """The rows whose rate is within these bounds, in order."""
        return [index for index, rate in sorted(self.rates.items()) if low <= rate <= high]


def with_solve_rate(rows: Rows, cfg: DataConfig) -> Rows:
    """The rows that `data.solve_rate` keeps. Raises UserError for rates of other rows, and where it keeps none."""
    if cfg.solve_rates is None:
        return rows
    known = SolveRates.read(Path(cfg.solve_rates))
    known.check(rows, cfg)
    if cfg.solve_rate is None:
        return rows
    places = known.between(*cfg.solve_rate)
    if not places:
        low, high = cfg.solve_rate
        raise UserError(
            f"data.solve_rate: none of the {len(known.rates):,} tasks in {cfg.solve_rates} has a solve rate from "
            f"{low:g} to {high:g}"
        )
    return _chosen(rows, places)


def known_rates(cfg: DataConfig) -> dict[int, float]:
    """The rates of a section's file, by the rows that `with_solve_rate` leaves."""
    if cfg.solve_rates is None:
        return {}
    known = SolveRates.read(Path(cfg.solve_rates))
    if cfg.solve_rate is None:
        return dict(known.rates)
    return {place: known.rates[index] for place, index in enumerate(known.between(*cfg.solve_rate))}


@dataclass(frozen=True, slots=True)
class SomeRows:
    """Some of the rows, by their places."""

    rows: Rows
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[self.places[index]]


def _chosen(rows: Rows, places: Sequence[int]) -> Rows:
    from datasets import Dataset

    found: Any = rows.select(places) if isinstance(rows, Dataset) else SomeRows(rows, places)
    chosen: Rows = found
    return chosen


def _plain(rows: Rows) -> Rows:
    """The rows without the names that a recipe adds: they are the same rows under every name."""
    return rows.rows if isinstance(rows, Renamed) else rows


def _within(value: Any, low: float, high: float) -> Any:
    if not low <= value <= high:
        raise ValueError(f"{value} is not from {low} to {high}")
    return value
