"""Rows of a dataset by index, under the names that a recipe gives their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isnan
from typing import Any, Protocol

from grpo.config import DataConfig
from grpo.errors import UserError

BLOCK = 50_000
"""Rows of a table that are looked at together: a selection of rows is copied out to be looked at."""


class Rows(Protocol):
    """Rows by index, each a mapping from column to value."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Renamed:
    """Rows whose columns go by more names: by name, the path of keys to what it stands for."""

    rows: Rows
    cfg: DataConfig
    paths: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**row, **{name: self._column(index, row, name) for name in self.paths}}

    def _column(self, index: int, row: Mapping[str, Any], name: str) -> Any:
        try:
            return _at(row, self.paths[name])
        except (KeyError, TypeError, ValueError):
            old, where = self.cfg.columns[name], f"row {index} of {self.cfg.label}"
            raise UserError(f"data.columns.{name}: no column {old!r} in {where}; there is {', '.join(row)}") from None


def renamed(rows: Rows, cfg: DataConfig) -> Rows:
    """The rows with `cfg.columns` added. Raises UserError for a column that the first row does not have."""
    first = rows[0]
    # A column may have a dot in its own name.
    paths = {name: (old,) if old in first else tuple(old.split(".")) for name, old in cfg.columns.items()}
    found = Renamed(rows, cfg, paths)
    found[0]  # what is missing from the start is said before a model is loaded
    return found


def _at(row: Any, path: tuple[str, ...]) -> Any:
    """What is at a path of keys and positions; None below a null, and beyond the ends of a list."""
    for key in path:
        if isinstance(row, list):
            position = int(key)
            row = row[position] if -len(row) <= position < len(row) else None
        elif row is not None:
            row = row[key]
    return row


def is_null(value: Any) -> bool:
    """Whether there is nothing in a column: null, or the NaN that tables hold where a number is missing."""
    return value is None or (isinstance(value, float) and isnan(value))


def rows_with_null(rows: Rows, columns: Sequence[str]) -> int:
    """The number of rows with a null or NaN in one of the columns. Built-in rows have none."""
    from datasets import Dataset

    if isinstance(rows, Renamed):
        columns = [rows.paths.get(name, (name,))[0] for name in columns]
        rows = rows.rows
    if not isinstance(rows, Dataset):
        return sum(_has_null(rows[index], columns) for index in range(len(rows)))
    named = [name for name in columns if name in rows.column_names]
    tables = rows.select_columns(named).with_format("arrow").iter(BLOCK) if named else ()
    return sum(_rows_with_null(table, named) for table in tables)


def _rows_with_null(table: Any, columns: Sequence[str]) -> int:
    """The same of a table of Arrow."""
    from pyarrow import compute

    nulls = (compute.is_null(table[name], nan_is_null=True) for name in columns)
    return int(compute.sum(reduce(compute.or_, nulls)).as_py() or 0)


def _has_null(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    return any(is_null(row[name]) for name in columns if name in row)
