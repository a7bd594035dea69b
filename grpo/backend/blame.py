"""Whose error an exception is, and where it was raised: a way that fails is told by its real reason."""

from __future__ import annotations

import traceback
from pathlib import Path

from grpo.backend.hub import one_line

PACKAGE = Path(__file__).parents[1]


def cause(error: BaseException) -> str:
    """The exception's type, the file and line that raised it, and its text, in one line."""
    raised = _raised_in(error)
    where = "" if raised is None else f" in {_short(Path(raised.filename))}:{raised.lineno}"
    return f"{type(error).__name__}{where}: {one_line(error)}"


def is_ours(error: BaseException) -> bool:
    """Whether this package's own code raised it, or called what did: MLX's operations have no Python code."""
    raised = _raised_in(error)
    return raised is not None and Path(raised.filename).is_relative_to(PACKAGE)


def _raised_in(error: BaseException) -> traceback.FrameSummary | None:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1] if frames else None


def _short(file: Path) -> Path:
    """A file by its package, without the folders before it."""
    parts = file.parts
    for mark in ("site-packages", PACKAGE.parent.name):
        if mark in parts:
            return Path(*parts[parts.index(mark) + 1 :])
    return Path(file.name)
