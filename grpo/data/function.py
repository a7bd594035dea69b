"""Rows that a function of the user's returns (`data.use`), checked like any other."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from grpo.backend.hub import one_line
from grpo.config import DataConfig
from grpo.data.rows import Rows
from grpo.errors import UserError
from grpo.plugins import Function, Located

MOST_ROWS = 10_000_000
"""Rows of an iterable; beyond that it is taken to have no end."""


def load_function(cfg: DataConfig) -> Rows:
    """What the function in `cfg.use` returns: a `datasets.Dataset` as it is, anything else as a list of dicts.

    Raises UserError for a function that cannot be imported or called with `cfg.kwargs`, one that raises, and for a
    result that is not rows.
    """
    assert cfg.use is not None
    function = Located(cfg.use, cfg.use, "data").load()
    arguments = _arguments(function, cfg)
    return _guarded(cfg.use, lambda: _rows(function(**arguments), cfg))


def _arguments(function: Function, cfg: DataConfig) -> dict[str, Any]:
    """`cfg.kwargs`, and the split where the function takes one."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # code without a signature: the call will tell
        return dict(cfg.kwargs)
    named = signature.parameters.get("split")
    if "split" in cfg.kwargs and named is not None:
        raise UserError(f"data {cfg.use}: its argument `split` comes from data.split and eval.split, not from kwargs")
    if named is None and cfg.split != "train":
        raise UserError(
            f"data {cfg.use}: the function takes no `split`, so its rows are one split, 'train'; there is no "
            f"{cfg.split!r}. Give it a parameter `split`, or name held-out rows by eval.source or eval.use"
        )
    arguments = {**cfg.kwargs, **({"split": cfg.split} if named is not None else {})}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"data {cfg.use}: {error} (its arguments come from kwargs)") from None
    return arguments


def _guarded(use: str, call: Callable[[], Rows]) -> Rows:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # the user's code: whatever it raises is theirs to see
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise UserError(f"data {use}: it raised {type(error).__name__}: {one_line(error)} ({where})") from error


def _rows(found: Any, cfg: DataConfig) -> Rows:
    from datasets import Dataset, DatasetDict

    if isinstance(found, DatasetDict):
        if cfg.split not in found:
            raise UserError(f"data {cfg.use}: no split {cfg.split!r}; there is {', '.join(map(str, found))}")
        found = found[cfg.split]
    if isinstance(found, Dataset):
        table: Rows = found
        return table
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
        raise UserError(
            f"data {cfg.use}: it returned {type(found).__name__}; wanted are rows: a list of dicts, a datasets.Dataset "
            "or an iterable of dicts"
        )
    rows = list(islice(found, MOST_ROWS + 1))
    if len(rows) > MOST_ROWS:
        raise UserError(f"data {cfg.use}: it gave more than {MOST_ROWS:,} rows, as if it had no end; return fewer")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            hint = "; of a DataFrame return df.to_dict('records')" if hasattr(found, "to_dict") else ""
            raise UserError(
                f"data {cfg.use}: row {index} is not a dict with names of columns, but {type(row).__name__}: "
                f"{str(row)[:80]!r}{hint}"
            )
    return rows
