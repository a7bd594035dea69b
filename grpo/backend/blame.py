"""Where an exception was raised, and whether by grpo's code.

grpo reports the real reason why a fast path failed, and does not blame the model for grpo's errors.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from grpo.backend.hub import one_line

PACKAGE = Path(__file__).parents[1]


def cause(error: BaseException) -> str:
    """One line with the exception's type, the file and line that raised it, and the exception's message."""
    raised = _raised_in(error)
    where = "" if raised is None else f" in {_short(Path(raised.filename))}:{raised.lineno}"
    return f"{type(error).__name__}{where}: {one_line(error)}"


def is_ours(error: BaseException) -> bool:
    """Whether the innermost Python frame is in this package.

    MLX's operations have no Python frames: an error in an operation counts as raised by the calling code.
    """
    raised = _raised_in(error)
    return raised is not None and Path(raised.filename).is_relative_to(PACKAGE)


def _raised_in(error: BaseException) -> traceback.FrameSummary | None:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1] if frames else None


def _short(file: Path) -> Path:
    """A file's path without the folders above its package."""
    parts = file.parts
    for mark in ("site-packages", PACKAGE.parent.name):
        if mark in parts:
            return Path(*parts[parts.index(mark) + 1 :])
    return Path(file.name)
