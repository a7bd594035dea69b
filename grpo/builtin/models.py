"""Built-in models by name: made on this machine the first time, then found in the cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from grpo.backend.cache import cache_folder
from grpo.builtin.student import NewModel, Student, make
from grpo.errors import UserError

MODELS = {
    "builtin:arithmetic-student": Student(),
    "builtin:countdown-student": Student(task="builtin:countdown"),
    "builtin:sorting-student": Student(task="builtin:sorting"),
    "builtin:format-student": Student(task="builtin:format", good_last=0.2),
    "builtin:guess-student": Student(task="builtin:guess"),
    "builtin:shop-student": Student(task="builtin:shop"),
    "builtin:walk-student": Student(task="builtin:walk"),
}
NAMES = tuple(MODELS)
VERSION = 1
"""To be raised when the same settings make another model: after a change to the maker, its tokenizer or its task."""


ASIDE = ".making-"
"""How folders begin in which models are made; `_aside` says what follows."""
DAY = 86400.0
"""In seconds: a folder that has not changed for so long has no maker, whatever process has that id now."""


def folder(name: str, new_model: NewModel) -> Path:
    """The folder of a built-in model in Hub layout, which `new_model` is asked for where it has to be made.

    It appears whole, by one rename, or not at all.
    """
    settings = MODELS[name]
    digest = hashlib.sha256(repr((VERSION, asdict(settings))).encode()).hexdigest()[:12]
    final = cache_folder() / f"{name.partition(':')[2]}-{digest}"
    if final.is_dir():
        return final
    print(f"making {name}, once: {settings.steps} supervised steps, a minute or more", file=sys.stderr)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final.parent)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=_aside(os.getpid())) as aside:
            made = Path(aside) / "model"
            made.mkdir()
            make(settings, made, new_model)
            try:
                made.rename(final)
            except OSError:
                if not final.is_dir():  # or else another process was as fast, and made the same
                    raise
    except OSError as error:
        raise UserError(
            f"{final.parent}: cannot keep the model here: {error.strerror} (GRPO_CACHE moves it)"
        ) from error
    return final


def _aside(process: int) -> str:
    """How a maker's folder begins: with this machine's name, since a home folder may serve several, and its process."""
    return f"{ASIDE}{platform.node()}+{process}+"


def _remove_abandoned(cache: Path) -> None:
    """Remove what makers left that were killed: of processes that are gone, or older than a day."""
    for left in cache.glob(f"{ASIDE}*"):
        try:
            old = time.time() - left.stat().st_mtime > DAY
        except OSError:  # its maker has just removed it
            continue
        here, _, process = left.name.removeprefix(ASIDE).partition("+")
        if old or (here == platform.node() and not _is_running(process.partition("+")[0])):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether a process with this id may be there. A name without an id says nothing."""
    if not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another person
        pass
    return True
