"""Rows of a dataset by index, with the column names that a recipe adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isnan
from typing import Any, Protocol

from grpo.config import DataConfig
from grpo.config.data import SELECTED_BY
from grpo.errors import UserError

BLOCK = 50_000
"""Rows of a table that are checked together, because checking a selection of rows copies it."""


class Rows(Protocol):
    """Rows by index, each a mapping from column to value."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Names:
    """Additional column names: `paths` maps each name to the path of keys to its value."""

    cfg: DataConfig
    paths: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, cfg: DataConfig, first: Mapping[str, Any]) -> Names:
        """The names in `cfg.columns`, for rows with the columns of `first`. A column's name may contain a dot."""
        return cls(cfg, {name: (old,) if old in first else tuple(old.split(".")) for name, old in cfg.columns.items()})

    def added(self, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the additional names and the recipe's environment. Raises UserError for a missing column."""
        named = {name: self._column(index, row, name) for name in self.paths}
        environment = {} if self.cfg.environment is None else {SELECTED_BY: self.cfg.environment}
        return {**row, **named, **environment}

    def _column(self, index: int, row: Mapping[str, Any], name: str) -> Any:
        try:
            return _at(row, self.paths[name])
        except (KeyError, TypeError, ValueError):
            old, where = self.cfg.columns[name], f"row {index} of {self.cfg.label}"
            raise UserError(f"data.columns.{name}: no column {old!r} in {where}; it has {', '.join(row)}") from None


@dataclass(frozen=True, slots=True)
class Renamed:
    """Rows with additional column names."""

    rows: Rows
    names: Names

    @property
    def cfg(self) -> DataConfig:
        """The `data` section with the names."""
        return self.names.cfg

    @property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """The path of keys to each name's value."""
        return self.names.paths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.names.added(index, self.rows[index])


def renamed(rows: Rows, cfg: DataConfig) -> Rows:
    """The rows with `cfg.columns` added. Raises UserError for a column that the first row does not have."""
    found = Renamed(rows, Names.of(cfg, rows[0]))
    found[0]  # raises for a missing column before a model is loaded
    return found


def _at(row: Any, path: tuple[str, ...]) -> Any:
    """The value at a path of keys and list positions; None below a null, and beyond the ends of a list."""
    for key in path:
        if isinstance(row, list):
            position = int(key)
            row = row[position] if -len(row) <= position < len(row) else None
        elif row is not None:
            row = row[key]
    return row


def is_null(value: Any) -> bool:
    """Whether a value is missing: null, or NaN, which tables use for a missing number."""
    return value is None or (isinstance(value, float) and isnan(value))


def rows_with_null(rows: Rows, columns: Sequence[str]) -> int:
    """Number of rows with a null or NaN in one of the columns. Built-in rows have none."""
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
    """Number of rows of an Arrow table with a null or NaN in one of the columns."""
    from pyarrow import compute

    nulls = (compute.is_null(table[name], nan_is_null=True) for name in columns)
    return int(compute.sum(reduce(compute.or_, nulls)).as_py() or 0)


def _has_null(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    return any(is_null(row[name]) for name in columns if name in row)
