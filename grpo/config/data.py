"""Where rows may come from: what `data.source`, `data.use` and their like in `eval` can say, and how they are named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Endings of data files, and the reader of `datasets` for each."""

Source = str | tuple[str, ...]


def is_files(source: Source) -> bool:
    """Whether a source names data files: one, several, or those that match a pattern."""
    return isinstance(source, tuple) or Path(source).suffix in FILE_TYPES or is_pattern(source)


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern of file names: no dataset on the Hub has such characters in its name."""
    return any(character in name for character in "*?[")


def is_builtin(source: Source) -> bool:
    """Whether a source is a built-in task."""
    return isinstance(source, str) and source.startswith("builtin:")


def origins(source: Source | None, use: str | None) -> tuple[str, ...]:
    """All names by which a section says where rows come from."""
    named = source if isinstance(source, tuple) else (source, use)
    return tuple(name for name in named if name)


def data_label(source: Source | None, use: str | None) -> str:
    """The name of rows in messages: the source or the function; of several files the first and how many more."""
    if isinstance(source, tuple):
        return source[0] if len(source) == 1 else f"{source[0]} and {len(source) - 1} more"
    return source or use or ""


def check_origin(section: str, source: Source | None, use: str | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where `source`, `use` and `kwargs` of a section do not go together."""
    if source is not None and use is not None:
        raise ValueError(f"{section}.use and {section}.source both say where rows come from: leave out one of them")
    if kwargs and use is None:
        raise ValueError(f"{section}.kwargs does nothing without {section}.use")
    for name in source if isinstance(source, tuple) else ():
        if not is_files(name):
            raise ValueError(f"{section}.source: a list holds files ({', '.join(FILE_TYPES)}); {name!r} is not a file")


def check_hub_only(setting: str, source: Source | None, use: str | None) -> None:
    """Raise ValueError for a setting of Hub datasets beside rows that certainly do not come from the Hub."""
    if use is not None or (source is not None and (is_builtin(source) or is_files(source))):
        raise ValueError(f"{setting} is for Hub datasets; this source has none")
