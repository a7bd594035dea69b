"""Copies of the adapters that a run starts from (`adapter.path`) and learns from (`teacher.adapter`).

The run keeps copies in its folder, so that it can resume even if the originals are deleted or changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from grpo.config import Recipe
from grpo.model.saved import CONFIG, weights_file
from grpo.recipes import with_settings
from grpo.runs.checkpoint import hash_of, sync

STARTING, TAUGHT_BY = "starting_adapter", "teacher_adapter"
"""Names of the copies in the run's folder. The run's own recipe names them; the path is relative to that recipe."""
KEPT = {"adapter.path": STARTING, "teacher.adapter": TAUGHT_BY}
"""The settings that name an adapter, and the name of each adapter's copy."""


def partial(name: str) -> str:
    """The temporary name of the copy `name` while it is being made."""
    return f".{name}.partial"


def put_aside(name: str) -> str:
    """The temporary name of an old copy while a new one replaces it."""
    return f".{name}.former"


COPIES = tuple(folder for name in KEPT.values() for folder in (name, put_aside(name)))
"""All names that a copy may have in a run's folder."""


def named_as_kept(cfg: Recipe) -> Recipe:
    """The recipe as the run's folder stores it, with the run's copies instead of the adapters that it names."""
    return with_settings(cfg, {setting: KEPT[setting] for setting in _adapters(cfg)})


def with_kept(cfg: Recipe, run: Path) -> Recipe:
    """The recipe with the copies that `run` keeps, except where the original folder now holds a different adapter."""
    found = {setting: _kept(folder, run, KEPT[setting]) for setting, folder in _adapters(cfg).items()}
    return with_settings(cfg, {setting: str(kept.resolve()) for setting, kept in found.items() if kept is not None})


def adapter_hashes(cfg: Recipe) -> dict[str, str]:
    """The SHA-256 of each adapter that the recipe names, by setting."""
    files = {setting: weights_file(folder) for setting, folder in _adapters(cfg).items()}
    return {setting: hash_of(weights) for setting, weights in files.items() if weights is not None}


def keep_adapters(cfg: Recipe, run: Path) -> None:
    """Give the run a copy of each adapter that the recipe names, if the adapter exists."""
    named = {KEPT[setting]: folder for setting, folder in _adapters(cfg).items()}
    others = {name: folder for name, folder in named.items() if folder.resolve() != (run / name).resolve()}
    put_copies(_copied(others, run), run)


def copy_adapters(cfg: Recipe, run: Path) -> list[str]:
    """Copy each adapter that the recipe names into the run's folder, under a temporary hidden name.

    Returns the names of the copies. Adapters that do not exist are skipped.
    """
    return _copied({KEPT[setting]: folder for setting, folder in _adapters(cfg).items()}, run)


def put_copies(names: list[str], run: Path) -> None:
    """Give these copies their final names, and delete older copies of the same names.

    An older copy is deleted last: if the process is killed at any moment, `with_kept` finds one of the two.
    """
    for name in names:
        final, former = run / name, run / put_aside(name)
        if final.exists():
            shutil.rmtree(former, ignore_errors=True)
            final.rename(former)
        (run / partial(name)).rename(final)
        sync(run)
        shutil.rmtree(former, ignore_errors=True)


def drop_partial(run: Path) -> None:
    """Delete incomplete copies."""
    for name in KEPT.values():
        shutil.rmtree(run / partial(name), ignore_errors=True)


def _adapters(cfg: Recipe) -> dict[str, Path]:
    """The folders of the adapters that a recipe names, by setting."""
    named = {"adapter.path": cfg.adapter.path, "teacher.adapter": cfg.teacher.adapter if cfg.teacher else None}
    return {setting: Path(folder) for setting, folder in named.items() if folder is not None}


def _kept(folder: Path, run: Path, name: str) -> Path | None:
    """The run's copy `name`; None if there is none, or if `folder` now holds a different adapter."""
    kept = next((run / place for place in (name, put_aside(name)) if (run / place).is_dir()), None)
    if kept is None:
        return None
    named, copied = weights_file(folder), weights_file(kept)
    changed = named is not None and copied is not None and hash_of(named) != hash_of(copied)
    return None if changed else kept


def _copied(folders: Mapping[str, Path], run: Path) -> list[str]:
    """Copy adapters from `folders`, given by the names of the copies. Returns the names of those that exist."""
    return [name for name, folder in folders.items() if _copy(folder, run / partial(name))]


def _copy(folder: Path, aside: Path) -> bool:
    weights = weights_file(folder)
    if weights is None:
        return False
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for source in (weights, weights.with_name(CONFIG)):
        if source.is_file():
            shutil.copyfile(source, aside / source.name)
            sync(aside / source.name)
    sync(aside)
    return True
