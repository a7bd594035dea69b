"""The adapters that a run began from (`adapter.path`) and learns from (`teacher.adapter`): the run keeps copies.

So neither can go away, or change, before the run goes on.
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
"""The copies' folders in a run's, and what the run's own recipe names: they are found beside that."""
KEPT = {"adapter.path": STARTING, "teacher.adapter": TAUGHT_BY}
"""The settings that name an adapter, and the folder of each one's copy."""


def partial(name: str) -> str:
    """Where the copy `name` is while it is made."""
    return f".{name}.partial"


def put_aside(name: str) -> str:
    """Where a copy is while another takes its place."""
    return f".{name}.former"


COPIES = tuple(folder for name in KEPT.values() for folder in (name, put_aside(name)))
"""All folders in which a run may have a copy."""


def named_as_kept(cfg: Recipe) -> Recipe:
    """The recipe as a run's folder has it, with the run's own copies for the adapters that it names."""
    return with_settings(cfg, {setting: KEPT[setting] for setting in _adapters(cfg)})


def with_kept(cfg: Recipe, run: Path) -> Recipe:
    """The recipe with the copies that `run` keeps, unless a folder that it names holds another adapter by now."""
    found = {setting: _kept(folder, run, KEPT[setting]) for setting, folder in _adapters(cfg).items()}
    return with_settings(cfg, {setting: str(kept.resolve()) for setting, kept in found.items() if kept is not None})


def adapter_hashes(cfg: Recipe) -> dict[str, str]:
    """A SHA-256 of each adapter that the recipe names, by the settings' names."""
    files = {setting: weights_file(folder) for setting, folder in _adapters(cfg).items()}
    return {setting: hash_of(weights) for setting, weights in files.items() if weights is not None}


def keep_adapters(cfg: Recipe, run: Path) -> None:
    """See to it that the run has a copy of each adapter that the recipe names, if it can be had."""
    named = {KEPT[setting]: folder for setting, folder in _adapters(cfg).items()}
    others = {name: folder for name, folder in named.items() if folder.resolve() != (run / name).resolve()}
    put_copies(_copied(others, run), run)


def copy_adapters(cfg: Recipe, run: Path) -> list[str]:
    """Copy each adapter that the recipe names into the run's folder, under a hidden name.

    Returns the names of the copies, without those of adapters that are not there.
    """
    return _copied({KEPT[setting]: folder for setting, folder in _adapters(cfg).items()}, run)


def put_copies(names: list[str], run: Path) -> None:
    """Give these copies their names, in the place of others that may be there.

    The other one is deleted last: at whatever moment the process is killed, `with_kept` finds one of the two.
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
    """Delete copies that were not made in full."""
    for name in KEPT.values():
        shutil.rmtree(run / partial(name), ignore_errors=True)


def _adapters(cfg: Recipe) -> dict[str, Path]:
    """The folders of the adapters that a recipe names, by the settings' names."""
    named = {"adapter.path": cfg.adapter.path, "teacher.adapter": cfg.teacher.adapter if cfg.teacher else None}
    return {setting: Path(folder) for setting, folder in named.items() if folder is not None}


def _kept(folder: Path, run: Path, name: str) -> Path | None:
    """The copy of this name, unless there is none, or `folder` holds another adapter by now."""
    kept = next((run / place for place in (name, put_aside(name)) if (run / place).is_dir()), None)
    if kept is None:
        return None
    named, copied = weights_file(folder), weights_file(kept)
    changed = named is not None and copied is not None and hash_of(named) != hash_of(copied)
    return None if changed else kept


def _copied(folders: Mapping[str, Path], run: Path) -> list[str]:
    """Copy these adapters, by the names of their copies. Returns the names of those that were there."""
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
