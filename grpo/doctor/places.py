"""Recipes, and the folders that are written to: are they there, is there room, may we write?"""

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
"""Bytes free under which nothing of ours can be written."""
RUNS_WANT, CACHE_WANTS, HUB_WANTS = 2 * 2**30, 2**28, 10 * 2**30
"""Bytes free under which space may run out: for checkpoints and completions, small models, models from the Hub."""
COUNT_SECONDS = 2.0
"""How long to add up what a folder holds."""

Free = Callable[[Path], int]


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def recipes(ours: Path | None = None, mine: Path = Path("recipes")) -> Finding:
    """Whether the bundled recipes, and those in `./recipes`, can be read."""
    ours = ours or bundled("recipes")
    shipped = sorted(ours.glob("*.yaml"))
    if not shipped:
        return Finding("recipes", "fail", f"no bundled recipe in {ours}", "reinstall grpo-mlx")
    others = [] if mine.resolve() == ours.resolve() else sorted(mine.glob("*.yaml"))
    if broken := _broken(shipped):
        return Finding("recipes", "fail", f"a bundled recipe cannot be read: {broken}", "reinstall grpo-mlx")
    text = f"{len(shipped)} bundled in {ours}" + (f", {len(others)} in {mine}" if others else "")
    if broken := _broken(others):
        return Finding("recipes", "warn", f"{text}; one cannot be read: {broken}", "mend it; the others work")
    return Finding("recipes", "ok", text)


def _broken(paths: list[Path]) -> str | None:
    """What is wrong with the first of these recipes that cannot be read."""
    for path in paths:
        try:
            load_recipe(path)
        except UserError as error:
            return str(error).splitlines()[0]
    return None


def runs_folder(folder: Path = Path("runs"), free: Free = free_bytes) -> Finding:
    """Where runs go unless a recipe says otherwise."""
    return _place("runs folder", folder, RUNS_WANT, "work in another folder, or set output_dir", free)


def grpo_cache(folder: Path | None = None, free: Free = free_bytes) -> Finding:
    """Where models that are made here are kept."""
    return _place("grpo cache", folder or cache_folder(), CACHE_WANTS, "GRPO_CACHE=FOLDER moves it", free)


def hub_cache(folder: Path | None = None, offline: bool | None = None, free: Free = free_bytes) -> Finding:
    """Where models and datasets from the Hub are kept. Offline it is only read."""
    from huggingface_hub import constants

    folder = folder or Path(constants.HF_HUB_CACHE)
    finding = _place("hub cache", folder, HUB_WANTS, "HF_HOME=FOLDER moves it", free)
    if finding.status == "fail" and (constants.HF_HUB_OFFLINE if offline is None else offline):
        return Finding("hub cache", "warn", f"{finding.text}; offline it is only read", finding.remedy)
    return finding


def _place(name: str, folder: Path, wanted: int, remedy: str, free: Free) -> Finding:
    """A folder that is there, or can be made: what it holds, what is free there, and whether we may write."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:  # what permissions say is not all: quotas, read-only disks
            file.write(b"grpo")
    except OSError as error:
        return Finding(name, "fail", f"{folder.absolute()}: cannot be written: {error.strerror}", remedy)
    holds = f"holds {_held(folder)}" if folder.is_dir() else "not there yet"
    left = free(there)
    text = f"{folder.absolute()}: {holds}, {gigabytes(left)} free"
    if left < FULL:
        return Finding(name, "fail", f"{text}: full", f"make room, or elsewhere: {remedy}")
    if left < wanted:
        return Finding(name, "warn", f"{text}: little", f"make room, or elsewhere: {remedy}")
    return Finding(name, "ok", text)


def _held(folder: Path) -> str:
    """What a folder's files add up to, as far as can be seen in a short time."""
    total, until = 0, time.monotonic() + COUNT_SECONDS
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # downloads come and go
                total += os.lstat(os.path.join(here, name)).st_size
        if time.monotonic() > until:
            return f"more than {gigabytes(total)}"
    return gigabytes(total)
