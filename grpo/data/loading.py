"""Rows of a dataset: from files, a saved folder, the Hub, a built-in task, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.backend.hub import Repository, cached_commit, fetch, one_line
from grpo.builtin import tasks as builtin_tasks
from grpo.config import FILE_TYPES, DataConfig
from grpo.config.data import Origin, is_builtin, is_files
from grpo.data.files import is_saved, load_files, load_saved, stream_files
from grpo.data.function import load_function
from grpo.data.rates import with_solve_rate
from grpo.data.rows import Rows, renamed
from grpo.data.streaming import Streamed
from grpo.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(cfg: DataConfig) -> Rows:
    """The rows that `cfg` names.

    Raises UserError for a source that cannot be found, downloaded or read, for a source without rows, and for a missing
    column of `cfg.columns`.
    """
    return prepared_rows(_found(cfg), cfg)


def open_stream(cfg: DataConfig) -> Streamed:
    """The rows that `cfg` names, read on demand. Reads the first row immediately.

    Raises UserError as `load_rows` does, as far as the first row shows.
    """
    assert cfg.source is not None, "the schema refuses functions"
    if not is_files(cfg.source):
        if is_local(cfg):
            raise UserError(
                f"data.streaming does nothing with {cfg.source}, a folder that save_to_disk wrote: its rows are read "
                "from disk on demand anyway"
            )
        rows = Streamed(lambda: _load_hub(cfg, str(cfg.source), streaming=True), cfg)
    else:
        files, opened = stream_files(cfg.source, cfg.split)
        rows = Streamed(opened, cfg, files)
    if next(rows.read(), None) is None:
        raise UserError(f"data {cfg.label}: split {cfg.split!r} has no rows")
    return rows


def prepared_rows(rows: Rows, cfg: DataConfig) -> Rows:
    """The source's rows, filtered by `cfg.solve_rate`, with `cfg.columns` and `cfg.environment` added.

    Raises UserError if there are no rows.
    """
    if len(rows) == 0:
        raise UserError(f"data {cfg.label}: split {cfg.split!r} has no rows")
    rows = with_solve_rate(rows, cfg)
    return renamed(rows, cfg) if cfg.columns or cfg.environment else rows


def is_local(cfg: DataConfig) -> bool:
    """Whether the rows are available without the Hub."""
    return cfg.source is None or is_builtin(cfg.source) or is_files(cfg.source) or _is_saved(cfg.source)


def _found(cfg: DataConfig) -> Rows:
    source = cfg.source
    if source is None:
        return load_function(cfg)
    if is_files(source):
        return load_files(source, cfg.split)
    assert isinstance(source, str)
    if is_builtin(source):
        return builtin_tasks.rows(source, cfg.split)
    path = Path(source).expanduser()
    if _is_saved(source):
        if unread := cfg.changed & {"config", "revision"}:
            raise UserError(f"data.{min(unread)} is for Hub datasets; {source} is a folder")
        return load_saved(path, cfg.split)
    if path.is_file():
        raise UserError(f"data {source}: unknown file type; grpo reads {', '.join(FILE_TYPES)}")
    if path.is_dir() and (path.is_absolute() or source.startswith((".", "~"))):
        raise UserError(
            f"data {source}: save_to_disk did not write this folder: name a file in it, or several files with a "
            f"pattern such as {source}/*.jsonl ({', '.join(FILE_TYPES)})"
        )
    if path.is_absolute() or source.startswith((".", "~")):
        raise UserError(f"data {source}: there is no such file or folder ({', '.join(FILE_TYPES)})")
    if ".py:" in source:
        raise UserError(f"data {source}: to use a function that returns rows, set data.use (or eval.use), not source")
    rows: Rows = _load_hub(cfg, source)
    return rows


def _is_saved(source: Origin) -> bool:
    return isinstance(source, str) and is_saved(Path(source).expanduser())


def _load_hub(cfg: DataConfig, name: str, streaming: bool = False) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    def download(cached: bool) -> Any:
        with _offline() if cached else nullcontext():
            loaded = partial(load_dataset, name, split=cfg.split, revision=cfg.revision, streaming=streaming)
            rows: Any = _with_main(lambda config: loaded(name=config), cfg)
        if cached and cfg.revision is not None and not streaming:
            _check_cached(rows, name, cfg.revision)
        return rows

    try:
        return fetch(Repository("dataset", name, cfg.revision), download)
    except ValueError as error:  # an unknown config or split: the message lists the known ones, then shows code
        why, _, code = one_line(error).partition(" Example of usage")
        raise UserError(f"data {name}: {why}{' (data.config or eval.config)' if code else ''}") from error
    except DatasetsError as error:
        raise UserError(f"data {name}: cannot be read: {one_line(error.__cause__ or error)}") from error


def _with_main(loaded: Callable[[str | None], Any], cfg: DataConfig) -> Any:
    """The rows that `loaded` returns for the recipe's configuration. If the recipe names none and the dataset has
    several, uses `main` if there is one, as in GSM8K."""
    try:
        return loaded(cfg.config)
    except ValueError as error:
        if cfg.config is not None or "Config name is missing" not in str(error) or "'main'" not in str(error):
            raise
        return loaded("main")


@contextmanager
def _offline() -> Iterator[None]:
    """Make `datasets` use its cache immediately. By default it first tries the network for half a minute."""
    from datasets import config, logging

    before, verbosity = config.HF_HUB_OFFLINE, logging.get_verbosity()
    config.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.ERROR)  # grpo itself reports that the cache is used
    try:
        yield
    except ValueError as error:
        if "Couldn't find cache" not in str(error):
            raise
        raise FileNotFoundError(str(error)) from error
    finally:
        config.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)


def _check_cached(rows: Dataset, name: str, revision: str) -> None:
    """Raise OSError if these are not the rows of `revision`, because `datasets` returns what it cached last."""
    wanted = cached_commit(Repository("dataset", name, revision), "README.md") or revision
    found = Path(rows.cache_files[0]["filename"]).parent.name
    if found != wanted:
        raise FileNotFoundError(f"the cache has only {found}")
