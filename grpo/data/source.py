"""Rows of a dataset: from the Hub, from a file, or from a built-in task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo.backend.hub import Repository, cached_commit, fetch, one_line
from grpo.builtin import tasks as builtin_tasks
from grpo.config import FILE_TYPES, DataConfig
from grpo.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


class Rows(Protocol):
    """Rows by index, each a mapping from column to value."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def load_rows(cfg: DataConfig) -> Rows:
    """The rows that `cfg` names.

    Raises UserError for a source that cannot be found, fetched or read, for one without rows, and for a column of
    `cfg.columns` that is not there.
    """
    if cfg.source.startswith("builtin:"):
        rows: Rows = builtin_tasks.rows(cfg.source, cfg.split)
    elif Path(cfg.source).suffix in FILE_TYPES:
        rows = _load_file(Path(cfg.source).expanduser(), cfg.split)
    elif Path(cfg.source).is_file():
        raise UserError(f"data {cfg.source}: files are read by their ending: {', '.join(FILE_TYPES)}")
    elif Path(cfg.source).is_absolute():
        what = "a folder: name a file in it" if Path(cfg.source).is_dir() else "no file"
        raise UserError(f"data {cfg.source}: {what} ({', '.join(FILE_TYPES)})")
    else:
        rows = _load_hub(cfg)
    if len(rows) == 0:
        raise UserError(f"data {cfg.source}: split {cfg.split!r} has no rows")
    return _renamed(rows, cfg) if cfg.columns else rows


def is_local(cfg: DataConfig) -> bool:
    """Whether the rows are to be had without the Hub."""
    return cfg.source.startswith("builtin:") or Path(cfg.source).suffix in FILE_TYPES


def _load_file(path: Path, split: str) -> Rows:
    from datasets import disable_progress_bars, load_dataset, logging

    if not path.is_file():
        raise UserError(f"data {path}: there is no such file")
    if split != "train":
        raise UserError(f"data {path}: a file is one split, 'train'; there is no {split!r}")
    if path.stat().st_size == 0:
        raise UserError(f"data {path}: the file is empty")
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # what its readers have to say is said below
    try:
        rows: Rows = load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # the readers raise their own kinds, and all of them mean the file
        if "corresponds to no data" in str(error):
            raise UserError(f"data {path}: the file has no rows") from error
        why = (_wrong_line(path) if path.suffix == ".jsonl" else None) or one_line(error.__cause__ or error)
        raise UserError(f"data {path}: cannot be read as {path.suffix[1:]}: {why}") from error
    return rows


def _wrong_line(path: Path) -> str | None:
    """The first line that is no JSON object; the readers count rows, of a block and from 0."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is no object: {line.decode().strip()[:80]}"
            except json.JSONDecodeError as error:
                return f"line {number}, column {error.colno}: {error.msg}"
            except ValueError:
                return f"line {number} is not text in UTF-8"
    return None


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
            old, where = self.cfg.columns[name], f"row {index} of {self.cfg.source}"
            raise UserError(f"data.columns.{name}: no column {old!r} in {where}; there is {', '.join(row)}") from None


def _renamed(rows: Rows, cfg: DataConfig) -> Rows:
    first = rows[0]
    # A column may have a dot in its own name.
    paths = {name: (old,) if old in first else tuple(old.split(".")) for name, old in cfg.columns.items()}
    renamed = Renamed(rows, cfg, paths)
    renamed[0]  # what is missing from the start is said before a model is loaded
    return renamed


def _at(row: Any, path: tuple[str, ...]) -> Any:
    """What is at a path of keys and positions; None below a null, and beyond the ends of a list."""
    for key in path:
        if isinstance(row, list):
            position = int(key)
            row = row[position] if -len(row) <= position < len(row) else None
        elif row is not None:
            row = row[key]
    return row


def rows_with_null(rows: Rows, columns: Sequence[str]) -> int:
    """How many rows have a null in one of the columns. Built-in rows have none."""
    from datasets import Dataset

    if isinstance(rows, Renamed):
        columns = [rows.paths.get(name, (name,))[0] for name in columns]
        rows = rows.rows
    if not isinstance(rows, Dataset):
        return 0
    found = [rows.with_format("arrow")[name][:].is_null() for name in columns if name in rows.column_names]
    return sum(any(row) for row in zip(*(nulls.to_pylist() for nulls in found), strict=True))


def _load_hub(cfg: DataConfig) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    def download(cached: bool) -> Rows:
        with _offline() if cached else nullcontext():
            rows: Any = load_dataset(cfg.source, cfg.config, split=cfg.split, revision=cfg.revision)
        if cached and cfg.revision is not None:
            _check_cached(rows, cfg)
        found: Rows = rows
        return found

    try:
        return fetch(Repository("dataset", cfg.source, cfg.revision), download)
    except ValueError as error:  # an unknown config or split: the message lists the known ones, then shows code
        why, _, code = one_line(error).partition(" Example of usage")
        raise UserError(f"data {cfg.source}: {why}{' (data.config or eval.config)' if code else ''}") from error
    except DatasetsError as error:
        raise UserError(f"data {cfg.source}: cannot be read: {one_line(error.__cause__ or error)}") from error


@contextmanager
def _offline() -> Iterator[None]:
    """Have `datasets` look into its cache at once: by itself it asks in vain for half a minute before."""
    from datasets import config, logging

    before, said = config.HF_HUB_OFFLINE, logging.get_verbosity()
    config.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.ERROR)  # what it found there is said by us
    try:
        yield
    except ValueError as error:
        if "Couldn't find cache" not in str(error):
            raise
        raise FileNotFoundError(str(error)) from error
    finally:
        config.HF_HUB_OFFLINE = before
        logging.set_verbosity(said)


def _check_cached(rows: Dataset, cfg: DataConfig) -> None:
    """Raise OSError if these are not the rows of `cfg.revision`: `datasets` gives whatever it cached last."""
    wanted = cached_commit(Repository("dataset", cfg.source, cfg.revision), "README.md") or cfg.revision
    found = Path(rows.cache_files[0]["filename"]).parent.name
    if found != wanted:
        raise FileNotFoundError(f"the cache has only {found}")
