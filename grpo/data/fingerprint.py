"""A fingerprint of rows, which shows whether data has changed, wherever it is stored."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from grpo.data.rows import Renamed, Rows
from grpo.data.streaming import Streamed

MOST_ROWS = 50_000
"""Most rows that are read for a fingerprint. Of larger data, this many evenly spaced rows are read."""


def fingerprint(rows: Rows | Streamed) -> str:
    """A hash of the number of rows and their contents, 16 hexadecimal digits.

    It does not depend on paths, file times or storage formats. Of more than `MOST_ROWS` rows it covers a part, which
    includes the first and the last row.
    """
    if isinstance(rows, Streamed):
        return _digest([rows.fingerprint(), rows.cfg.columns])
    if isinstance(rows, Renamed):
        return _digest([fingerprint(rows.rows), rows.cfg.columns])
    count = len(rows)
    if count <= MOST_ROWS:
        chosen = list(range(count))
    else:
        chosen = [place * (count - 1) // (MOST_ROWS - 1) for place in range(MOST_ROWS)]
    hashed = hashlib.sha256(str(count).encode())
    for row in _plain(rows, chosen):
        hashed.update(_json(row))
    return hashed.hexdigest()[:16]


def _plain(rows: Rows, chosen: list[int]) -> list[Any]:
    """Rows in their stored form: images and audio stay bytes."""
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return [dict(rows[index]) for index in chosen]
    stored = rows.with_format("arrow")
    table: Any = stored[:] if len(chosen) == len(rows) else stored[chosen]
    found: list[Any] = table.to_pylist()
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value)).hexdigest()[:16]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=_text).encode()


def _text(value: Any) -> str:
    """A value that JSON cannot represent, as text that is the same in every process."""
    if isinstance(value, set | frozenset):
        return repr(sorted(map(repr, value)))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
