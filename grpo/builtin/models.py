"""Built-in models by name: made on this machine the first time, then found in the cache."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

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


def cache_folder() -> Path:
    """Where made models are kept: `$GRPO_CACHE`, or `grpo` in the user's cache folder."""
    if chosen := os.environ.get("GRPO_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo"


def folder(name: str, new_model: NewModel) -> Path:
    """The folder of a built-in model in Hub layout, which `new_model` is asked for where it has to be made.

    It appears whole, by one rename, or not at all.
    """
    settings = MODELS[name]
    digest = hashlib.sha256(repr((VERSION, asdict(settings))).encode()).hexdigest()[:12]
    final = cache_folder() / f"{name.partition(':')[2]}-{digest}"
    if final.is_dir():
        return final
    print(f"making {name}, once: {settings.steps} supervised steps, about half a minute", file=sys.stderr)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".making-") as aside:
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
