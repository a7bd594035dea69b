"""The folder in the user's cache where grpo stores files that it creates only once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$GRPO_CACHE`, or `grpo` in the user's cache folder. Raises RuntimeError for a user without a home."""
    if chosen := os.environ.get("GRPO_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo"
