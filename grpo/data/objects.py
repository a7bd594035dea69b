"""Rows from Python objects: a dataset, a list of dicts, a data frame, or another iterable of dicts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from grpo.data.rows import Rows
from grpo.errors import UserError

MOST_ROWS = 10_000_000
"""Most rows of an iterable. A longer iterable is assumed to be infinite."""
WANTED = "rows: a list of dicts, a datasets.Dataset, a pandas DataFrame or another iterable of dicts"


def rows_from(found: Any, what: str, split: str) -> Rows:
    """The rows of an object: a `datasets.Dataset` unchanged, anything else as a list of dicts.

    For a `DatasetDict`, the rows of `split`. `what` names the object in errors. Raises UserError for a missing split,
    and for an object that is not rows.
    """
    if has_splits(found):
        if split not in found:
            raise UserError(f"{what}: no split {split!r}; it has {', '.join(map(str, found))}")
        found = found[split]
    if _is_of("datasets", "Dataset", found):
        table: Rows = found
        return table
    if _is_of("pandas", "DataFrame", found):
        found = found.to_dict("records")
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
        raise UserError(f"{what} is of type {type(found).__name__}; expected {WANTED}")
    rows = list(islice(found, MOST_ROWS + 1))
    if len(rows) > MOST_ROWS:
        raise UserError(f"{what} gave more than {MOST_ROWS:,} rows, so it may be infinite; give fewer rows")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise UserError(
                f"{what}: row {index} is not a dict with column names, but {type(row).__name__}: {str(row)[:80]!r}"
            )
    return rows


def has_splits(found: Any) -> bool:
    """Whether an object holds several splits by name, as a `DatasetDict` does."""
    return _is_of("datasets", "DatasetDict", found)


def _is_of(package: str, name: str, found: Any) -> bool:
    """Whether an object is an instance of a package's class. Does not import the package, which takes a second: if
    there is an instance, the package is already imported."""
    kind = getattr(sys.modules.get(package), name, None)
    return kind is not None and isinstance(found, kind)
