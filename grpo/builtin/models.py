"""Built-in models by name. A model is trained on this machine the first time, and then read from the cache."""

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
"""Increase this number when the same settings make a different model: when the training, tokenizer, or task changes."""


ASIDE = ".making-"
"""Prefix of folders in which models are being made; `_aside` adds the rest."""
DAY = 86400.0
"""Seconds after which an unchanged folder counts as abandoned, even if a process with its id is running."""


def folder(name: str, new_model: NewModel) -> Path:
    """Return the folder of a built-in model in Hub layout. If it is not in the cache, train it, starting from the
    random weights of `new_model`.

    The folder appears with one rename, so it is never incomplete.
    """
    settings = MODELS[name]
    digest = hashlib.sha256(repr((VERSION, asdict(settings))).encode()).hexdigest()[:12]
    final = cache_folder() / f"{name.partition(':')[2]}-{digest}"
    if final.is_dir():
        return final
    print(f"training {name} (only once): {settings.steps} supervised steps, a minute or more", file=sys.stderr)
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
                if not final.is_dir():  # if it is there, another process has just made the same model
                    raise
    except OSError as error:
        raise UserError(
            f"{final.parent}: cannot store the model here: {error.strerror} (set GRPO_CACHE to another folder)"
        ) from error
    return final


def _aside(process: int) -> str:
    """Return the prefix of a maker's folder: this machine's name, because machines may share a home folder, and the
    process id."""
    return f"{ASIDE}{platform.node()}+{process}+"


def _remove_abandoned(cache: Path) -> None:
    """Remove the folders of killed makers: their process is gone, or they are older than a day."""
    for left in cache.glob(f"{ASIDE}*"):
        try:
            old = time.time() - left.stat().st_mtime > DAY
        except OSError:  # its maker has just removed it
            continue
        here, _, process = left.name.removeprefix(ASIDE).partition("+")
        if old or (here == platform.node() and not _is_running(process.partition("+")[0])):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether a process with this id may be running. True if the name has no id."""
    if not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process
        pass
    return True
