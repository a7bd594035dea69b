"""Files of solve rates: how often a model solved each task of a dataset. `grpo eval --solve-rates` writes them."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grpo.config import DataConfig
from grpo.data.fingerprint import fingerprint
from grpo.data.rows import Renamed, Rows
from grpo.errors import UserError

RateTable = npt.NDArray[np.float64]
"""Solve rates by row, NaN for a row without one."""


@dataclass(frozen=True, slots=True)
class SolveRates:
    """The solve rate of every row, float64 `[rows]`, NaN for a row without a rate; and the fingerprint of the rows.

    `about` is the file's description of the measurement: data, split, model, reward, samples.
    """

    rates: RateTable
    fingerprint: str
    about: Mapping[str, Any]

    @classmethod
    def of(cls, rates: Mapping[int, float], rows: Rows, about: Mapping[str, Any]) -> SolveRates:
        """Solve rates for `rows` from `rates`, which maps some rows' indices to their rates."""
        rows = _plain(rows)
        return cls(_table(len(rows), list(rates), list(rates.values())), fingerprint(rows), about)

    def write(self, path: Path) -> None:
        """Write a line of JSON about the rows, then a line per task. Raises OSError if the file cannot be written."""
        head = {**self.about, "rows": len(self.rates), "fingerprint": self.fingerprint}
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(head, ensure_ascii=False) + "\n")
            for index in np.flatnonzero(~np.isnan(self.rates)).tolist():
                file.write(json.dumps({"index": index, "solve_rate": float(self.rates[index])}) + "\n")

    @classmethod
    def read(cls, path: Path) -> SolveRates:
        """Read a file that `write` wrote. Raises UserError for a missing or malformed file."""
        path = path.expanduser()
        try:
            with path.open("rb") as file:
                about = json.loads(file.readline())
                rows, print_ = int(about.pop("rows")), str(about.pop("fingerprint"))
                rates = _read(file.read(), rows)
        except OSError as error:
            raise UserError(f"data.solve_rates {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"data.solve_rates {path}: {_wrong_place(path)} is not in the format of grpo eval --solve-rates: first "
                'a line with rows and fingerprint, then lines of {"index": 0, "solve_rate": 0.5} with rates from 0 to 1'
            ) from error
        return cls(rates, print_, about)

    def check(self, rows: Rows, cfg: DataConfig) -> None:
        """Raise UserError unless these rates were measured on `rows`."""
        rows = _plain(rows)
        if len(self.rates) != len(rows) or self.fingerprint != fingerprint(rows):
            count = f"{len(self.rates):,} rows"
            was = f"{self.about.get('data', 'other data')}, split {self.about.get('split', '?')}: {count}"
            raise UserError(
                f"data.solve_rates {cfg.solve_rates}: these rates were measured on other rows ({was}) than data "
                f"{cfg.label}, split {cfg.split} ({len(rows):,} rows). Measure these rows: grpo eval RECIPE --split "
                f"{cfg.split} --prompts {len(rows)} --solve-rates FILE"
            )

    @property
    def known(self) -> int:
        """Number of rows with a rate."""
        return int(np.count_nonzero(~np.isnan(self.rates)))

    @property
    def by(self) -> str:
        """The model and reward of the rates, in parentheses for messages; empty if the file does not name them."""
        about = self.about
        if not about.get("model") or not about.get("reward"):
            return ""
        who = f"{about['model']} with {about['adapter']}" if about.get("adapter") else about["model"]
        return f" (of {who}, by {about['reward']})"

    def between(self, low: float, high: float) -> npt.NDArray[np.int64]:
        """The indices of rows with a rate within these bounds, in order."""
        return np.flatnonzero((self.rates >= low) & (self.rates <= high))


def with_solve_rate(rows: Rows, cfg: DataConfig) -> Rows:
    """The rows that `data.solve_rate` keeps. Raises UserError for rates of other rows, and if no row is left."""
    if cfg.solve_rates is None or cfg.solve_rate is None:
        return rows
    measured = SolveRates.read(Path(cfg.solve_rates))
    measured.check(rows, cfg)
    places = measured.between(*cfg.solve_rate)
    if not len(places):
        low, high = cfg.solve_rate
        raise UserError(
            f"data.solve_rate: none of the {measured.known:,} tasks in {cfg.solve_rates} has "
            f"a solve rate from {low:g} to {high:g}"
        )
    return _chosen(rows, places)


def known_rates(cfg: DataConfig, rows: Rows) -> RateTable | None:
    """The rates of `rows` (after `with_solve_rate`) in the file of a `data` section; None without a file.

    Raises UserError for rates of other rows.
    """
    if cfg.solve_rates is None:
        return None
    measured = SolveRates.read(Path(cfg.solve_rates))
    if cfg.solve_rate is not None:  # `with_solve_rate` has checked the rates
        return measured.rates[measured.between(*cfg.solve_rate)]
    measured.check(rows, cfg)
    return measured.rates


@dataclass(frozen=True, slots=True)
class SomeRows:
    """A selection of rows, by their indices."""

    rows: Rows
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[self.places[index]]


def _chosen(rows: Rows, places: npt.NDArray[np.int64]) -> Rows:
    from datasets import Dataset

    found: Any = rows.select(places) if isinstance(rows, Dataset) else SomeRows(rows, places.tolist())
    chosen: Rows = found
    return chosen


def _plain(rows: Rows) -> Rows:
    """The rows without the column names that a recipe adds, which do not matter for their identity."""
    return rows.rows if isinstance(rows, Renamed) else rows


def _table(rows: int, indices: Any, rates: Any) -> RateTable:
    """The rates of all rows. Raises ValueError for an index or a rate that is out of bounds."""
    indices, rates = np.asarray(indices, np.int64), np.asarray(rates, np.float64)
    if not (((indices >= 0) & (indices < rows)).all() and ((rates >= 0) & (rates <= 1)).all()):
        raise ValueError("an index or a rate is out of bounds")
    table = np.full(rows, np.nan)
    table[indices] = rates
    return table


def _read(lines: bytes, rows: int) -> RateTable:
    """The rates from the lines after the first. Arrow reads a million lines in less than a second."""
    import pyarrow as pa
    from pyarrow import json as reader

    if not lines.strip():
        return _table(rows, [], [])
    schema = pa.schema([("index", pa.int64()), ("solve_rate", pa.float64())])
    read = reader.read_json(pa.BufferReader(lines), parse_options=reader.ParseOptions(explicit_schema=schema))
    return _table(rows, *(read[name].combine_chunks().to_numpy(zero_copy_only=True) for name in schema.names))


def _wrong_place(path: Path) -> str:
    """The first malformed line of a file."""
    with path.open("rb") as file:
        try:
            rows = int(json.loads(file.readline())["rows"])
        except (ValueError, KeyError, TypeError):
            return "its first line"
        for number, line in enumerate(file, start=2):
            try:
                if line.strip():
                    entry = json.loads(line)
                    _table(rows, [operator.index(entry["index"])], [float(entry["solve_rate"])])
            except (ValueError, KeyError, TypeError):
                return f"line {number}"
    return "its first line"
