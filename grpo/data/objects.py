"""Rows that are Python objects: a dataset, a list of dicts, a data frame, or anything else that gives dicts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from grpo.data.rows import Rows
from grpo.errors import UserError

MOST_ROWS = 10_000_000
"""Rows of an iterable; beyond that it is taken to have no end."""
WANTED = "rows: a list of dicts, a datasets.Dataset, a pandas DataFrame or another iterable of dicts"


def rows_from(found: Any, what: str, split: str) -> Rows:
    """The rows of an object: a `datasets.Dataset` as it is, anything else as a list of dicts.

    Of a `DatasetDict` the rows are those of `split`. `what` says in errors what the object is. Raises UserError for a
    split that is not there, and for what gives no rows.
    """
    if has_splits(found):
        if split not in found:
            raise UserError(f"{what}: no split {split!r}; there is {', '.join(map(str, found))}")
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
        raise UserError(f"{what} gave more than {MOST_ROWS:,} rows, as if it had no end; give fewer")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise UserError(
                f"{what}: row {index} is not a dict with names of columns, but {type(row).__name__}: {str(row)[:80]!r}"
            )
    return rows


def has_splits(found: Any) -> bool:
    """Whether an object holds several splits by name, as a `DatasetDict` does."""
    return _is_of("datasets", "DatasetDict", found)


def _is_of(package: str, name: str, found: Any) -> bool:
    """Whether an object is of a class of a package. Whoever has such an object has imported the package: it is not
    imported here, because that takes a second."""
    kind = getattr(sys.modules.get(package), name, None)
    return kind is not None and isinstance(found, kind)
