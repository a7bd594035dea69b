"""Rows on this machine: data files, and folders that `save_to_disk` wrote."""

from __future__ import annotations

import codecs
import glob
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from grpo.backend.hub import one_line
from grpo.config import FILE_TYPES
from grpo.config.data import Origin, is_files, is_pattern
from grpo.data.rows import Rows
from grpo.errors import UserError

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that identify a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
BLOCK = 2**20
"""Bytes per read."""


def load_files(source: Origin, split: str) -> Rows:
    """The rows of all files that `source` names, in the order of the list. Files of a pattern are sorted by name.

    Raises UserError for a file that is missing, empty or unreadable, and if the files' columns differ.
    """
    from datasets import concatenate_datasets, disable_progress_bars, logging

    paths = [path for name in ([source] if isinstance(source, str) else source) for path in _matching(name)]
    for path in paths:
        _check_file(path)
    _check_split(paths, split)
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # errors are reported below
    parts: list[Any] = [_load(list(same)) for _, same in groupby(paths, key=lambda path: FILE_TYPES[path.suffix])]
    try:
        rows: Rows = parts[0] if len(parts) == 1 else concatenate_datasets(list(map(_one_text, parts)))
    except ValueError as error:
        raise UserError(f"data {paths[0]} to {paths[-1]}: their columns differ: {one_line(error)}") from error
    return rows


def stream_files(source: Origin, split: str) -> tuple[list[Path], Callable[[], Any]]:
    """The files that `source` names, and a function that opens their rows as a `datasets.IterableDataset`.

    Raises UserError for a missing or empty file, and for files of several kinds.
    """
    load_dataset = _reader()

    paths = [path for name in ([source] if isinstance(source, str) else source) for path in _matching(name)]
    for path in paths:
        _check_there(path)
    _check_split(paths, split)
    kinds = sorted({path.suffix for path in paths})
    if len({FILE_TYPES[kind] for kind in kinds}) > 1:
        raise UserError(
            f"data {paths[0]}: all streamed files must be of one kind, but these are of several: {', '.join(kinds)}"
        )
    names = [glob.escape(str(path)) for path in paths]
    return paths, lambda: load_dataset(FILE_TYPES[kinds[0]], data_files=names, split="train", streaming=True)


def _reader() -> Callable[..., Any]:
    """`datasets.load_dataset` without its download counter, which calls the network even for local files, and without a
    network delays each call by up to five seconds."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    reader: Callable[..., Any] = datasets.load_dataset
    return reader


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in (SAVED, SAVED_SPLITS))


def is_one_split(source: str) -> bool:
    """Whether a source has only the split `train`: files, and a folder of `Dataset.save_to_disk`."""
    return is_files(source) or (Path(source).expanduser() / SAVED).is_file()


def load_saved(folder: Path, split: str) -> Rows:
    """The rows that `save_to_disk` wrote. Raises UserError for a missing split, and for a damaged folder."""
    from datasets import Dataset, load_from_disk

    try:
        found: Any = load_from_disk(str(folder))
    except Exception as error:  # readers raise many kinds of errors, all about the folder
        raise UserError(f"data {folder}: cannot be read as a saved dataset: {one_line(error)}") from error
    if not isinstance(found, Dataset):
        if split not in found:
            raise UserError(f"data {folder}: no split {split!r}; it has {', '.join(map(str, found))}")
        found = found[split]
    elif split != "train":
        raise UserError(f"data {folder}: the folder holds one dataset, split 'train'; there is no {split!r}")
    rows: Rows = found
    return rows


def _matching(name: str) -> list[Path]:
    """The file with this name, or the files that match the pattern, sorted by name."""
    path = Path(name).expanduser()
    if path.exists() or not is_pattern(name):
        return [path]
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not found:
        raise UserError(f"data {name}: no file matches this pattern")
    if odd := [path for path in found if path.suffix not in FILE_TYPES]:
        raise UserError(
            f"data {name}: the pattern matches {odd[0]}, which does not end in {', '.join(FILE_TYPES)}: use a narrower "
            "pattern, such as *.jsonl"
        )
    return found


def _check_split(paths: Sequence[Path], split: str) -> None:
    if split != "train":
        what = "a file is" if len(paths) == 1 else "files are"
        raise UserError(f"data {paths[0]}: {what} one split, 'train'; there is no {split!r} (data.split, eval.split)")


def _check_there(path: Path) -> None:
    if not path.is_file():
        looked = "" if path.is_absolute() else f" (grpo looks in {Path.cwd()}, and next to a recipe's file)"
        raise UserError(f"data {path}: there is no such file{looked}")
    if path.stat().st_size == 0:
        raise UserError(f"data {path}: the file is empty")


def _check_file(path: Path) -> None:
    _check_there(path)
    if FILE_TYPES[path.suffix] != "parquet" and (wrong := _not_utf8(path)):
        raise UserError(f"data {path}: {wrong}")


def _not_utf8(path: Path) -> str | None:
    """Why a file is not UTF-8 text, and what to do; None if it is. Readers notice this late, or never."""
    decoder, start, lines = codecs.getincrementaldecoder("utf-8")(), 0, 0
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            pending = decoder.getstate()[0]
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                seen = (pending + block)[: error.start]
                return _other_encoding(path, start - len(pending) + error.start, lines + seen.count(b"\n") + 1)
            if not block:
                return None
            start, lines = start + len(block), lines + block.count(b"\n")


def _other_encoding(path: Path, offset: int, line: int) -> str:
    with path.open("rb") as file:
        mark = file.read(2)
        file.seek(offset)
        byte = file.read(1)
    wide = mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    guess = "UTF-16" if wide else "WINDOWS-1252"
    shown = f"byte {offset + 1:,}" + (f" (0x{byte[0]:02x})" if byte else "")
    return (
        f"line {line:,}, {shown} is not UTF-8; the file is probably {guess}. "
        f"Convert it: iconv -f {guess} -t UTF-8 {path.name} > utf8{path.suffix}"
    )


def _load(paths: Sequence[Path]) -> Rows:
    """The rows of files of one kind."""
    load_dataset = _reader()

    try:
        names = [glob.escape(str(path)) for path in paths]
        rows: Rows = load_dataset(FILE_TYPES[paths[0].suffix], data_files=names, split="train")
    except Exception as error:  # readers raise many kinds of errors, all about the files
        if len(paths) > 1:
            for path in paths:
                _load([path])  # raises an error that names the file
            raise UserError(
                f"data {paths[0]} to {paths[-1]}: their columns differ: {one_line(error.__cause__ or error)}"
            ) from error
        (path,) = paths
        if "corresponds to no data" in str(error):
            raise UserError(f"data {path}: the file has no rows") from error
        why = (_wrong_line(path) if path.suffix == ".jsonl" else None) or one_line(error.__cause__ or error)
        raise UserError(f"data {path}: cannot be read as {path.suffix[1:]}: {why}") from error
    return rows


def _one_text(part: Any) -> Any:
    """The rows with one text type, because the readers of CSV and JSON return different types."""
    from datasets import Value

    large = [name for name, feature in part.features.items() if feature == Value("large_string")]
    for name in large:
        part = part.cast_column(name, Value("string"))
    return part


def _wrong_line(path: Path) -> str | None:
    """The first line that is not a JSON object. (Readers count rows instead, from 0 in each block.)"""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not an object: {line.decode().strip()[:80]}"
            except json.JSONDecodeError as error:
                return f"line {number}, column {error.colno}: {error.msg}"
    return None
