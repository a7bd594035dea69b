"""Rows from a user's function (`data.use`), checked like rows from other sources."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.backend.hub import one_line
from grpo.config import DataConfig
from grpo.data.objects import rows_from
from grpo.data.rows import Rows
from grpo.errors import UserError
from grpo.plugins import Function, Located


def load_function(cfg: DataConfig) -> Rows:
    """The rows that the function in `cfg.use` returns. See `rows_from`.

    Raises UserError if the function cannot be imported or called with `cfg.kwargs`, if it raises, and if its result is
    not rows.
    """
    assert cfg.use is not None
    function = Located(cfg.use, cfg.use, "data").load()
    arguments = _arguments(function, cfg)
    return _guarded(cfg.use, lambda: rows_from(function(**arguments), f"data {cfg.use}: its result", cfg.split))


def _arguments(function: Function, cfg: DataConfig) -> dict[str, Any]:
    """`cfg.kwargs`, and the split if the function has a parameter for it."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # without a signature, the call itself raises for wrong arguments
        return dict(cfg.kwargs)
    named = signature.parameters.get("split")
    if "split" in cfg.kwargs and named is not None:
        raise UserError(f"data {cfg.use}: its argument `split` comes from data.split and eval.split, not from kwargs")
    if named is None and cfg.split != "train":
        raise UserError(
            f"data {cfg.use}: the function has no parameter `split`, so its rows are one split, 'train'; there is no "
            f"{cfg.split!r}. Add a parameter `split`, or name held-out rows with eval.source or eval.use"
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
    except Exception as error:  # the user's code may raise anything, and the user must see it
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise UserError(f"data {use}: it raised {type(error).__name__}: {one_line(error)} ({where})") from error
