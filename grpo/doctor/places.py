"""Checks of recipes, and of the folders that grpo writes to: whether they exist, have space, and are writable."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from grpo.backend.cache import cache_folder
from grpo.doctor.finding import Finding, gigabytes
from grpo.errors import UserError
from grpo.plugins import bundled
from grpo.recipes import load_recipe

FULL = 100 * 2**20
"""A disk with fewer free bytes is full: grpo cannot write its files."""
RUNS_WANT, CACHE_WANTS, HUB_WANTS = 2 * 2**30, 2**28, 10 * 2**30
"""Free bytes below which space may run out: for checkpoints and completions, small models, models from the Hub."""
COUNT_SECONDS = 2.0
"""Time limit for adding up the sizes of a folder's files."""

Free = Callable[[Path], int]


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def recipes(ours: Path | None = None, mine: Path = Path("recipes")) -> Finding:
    """Check whether the bundled recipes, and the recipes in `./recipes`, can be read."""
    ours = ours or bundled("recipes")
    shipped = sorted(ours.glob("*.yaml"))
    if not shipped:
        return Finding("recipes", "fail", f"no bundled recipe in {ours}", "reinstall grpo-mlx")
    others = [] if mine.resolve() == ours.resolve() else sorted(mine.glob("*.yaml"))
    if broken := _broken(shipped):
        return Finding("recipes", "fail", f"a bundled recipe cannot be read: {broken}", "reinstall grpo-mlx")
    text = f"{len(shipped)} bundled in {ours}" + (f", {len(others)} in {mine}" if others else "")
    if broken := _broken(others):
        return Finding("recipes", "warn", f"{text}; one cannot be read: {broken}", "fix this recipe; the others work")
    return Finding("recipes", "ok", text)


def _broken(paths: list[Path]) -> str | None:
    """Return the error of the first recipe that cannot be read; None if all can."""
    for path in paths:
        try:
            load_recipe(path)
        except UserError as error:
            return str(error).splitlines()[0]
    return None


def runs_folder(folder: Path = Path("runs"), free: Free = free_bytes) -> Finding:
    """Check the default folder of runs."""
    return _place("runs folder", folder, RUNS_WANT, "work in another folder, or set output_dir", free)


def grpo_cache(folder: Path | None = None, free: Free = free_bytes) -> Finding:
    """Check the folder for models that grpo trains on this machine."""
    return _place("grpo cache", folder or cache_folder(), CACHE_WANTS, "set GRPO_CACHE to another folder", free)


def hub_cache(folder: Path | None = None, offline: bool | None = None, free: Free = free_bytes) -> Finding:
    """Check the folder for models and datasets from the Hub. Offline, grpo only reads it."""
    from huggingface_hub import constants

    folder = folder or Path(constants.HF_HUB_CACHE)
    finding = _place("hub cache", folder, HUB_WANTS, "set HF_HOME to another folder", free)
    if finding.status == "fail" and (constants.HF_HUB_OFFLINE if offline is None else offline):
        return Finding("hub cache", "warn", f"{finding.text}; offline, it is only read", finding.remedy)
    return finding


def _place(name: str, folder: Path, wanted: int, remedy: str, free: Free) -> Finding:
    """Check a folder, which need not exist yet: its size, the free space, and whether it is writable."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:  # permissions do not show quotas and read-only disks
            file.write(b"grpo")
    except OSError as error:
        return Finding(name, "fail", f"{folder.absolute()}: cannot be written: {error.strerror}", remedy)
    holds = f"holds {_held(folder)}" if folder.is_dir() else "does not exist yet"
    left = free(there)
    text = f"{folder.absolute()}: {holds}, {gigabytes(left)} free"
    if left < FULL:
        return Finding(name, "fail", f"{text}: the disk is full", f"free some space, or {remedy}")
    if left < wanted:
        return Finding(name, "warn", f"{text}: little space", f"free some space, or {remedy}")
    return Finding(name, "ok", text)


def _held(folder: Path) -> str:
    """Return the total size of a folder's files, or a lower bound if adding it up takes too long."""
    total, until = 0, time.monotonic() + COUNT_SECONDS
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # downloads come and go
                total += os.lstat(os.path.join(here, name)).st_size
        if time.monotonic() > until:
            return f"more than {gigabytes(total)}"
    return gigabytes(total)
