"""The adapter that a run began from (`adapter.path`): the run keeps a copy, so that its reference cannot go away."""

from __future__ import annotations

import shutil
from pathlib import Path

from grpo.config import AdapterConfig, Recipe
from grpo.model.saved import CONFIG, weights_file
from grpo.recipes import with_settings
from grpo.runs.checkpoint import hash_of, sync

STARTING = "starting_adapter"
"""The copy's folder in a run's, and what the run's own recipe names as `adapter.path`: it is found beside that."""
PARTIAL, PUT_ASIDE = f".{STARTING}.partial", f".{STARTING}.former"
"""The copy while it is made, and the copy that it takes the place of."""


def named_as_kept(cfg: Recipe) -> Recipe:
    """The recipe as a run's folder has it, with its own copy for the adapter that it begins from."""
    return cfg if cfg.adapter.path is None else _begins_from(cfg, STARTING)


def with_kept(cfg: Recipe, run: Path) -> Recipe:
    """The recipe with the copy that `run` keeps, unless the folder in `adapter.path` holds another adapter by now."""
    kept = next((run / name for name in (STARTING, PUT_ASIDE) if (run / name).is_dir()), None)
    if cfg.adapter.path is None or kept is None:
        return cfg
    named, copied = weights_file(Path(cfg.adapter.path)), weights_file(kept)
    if named is not None and copied is not None and hash_of(named) != hash_of(copied):
        return cfg
    return _begins_from(cfg, str(kept.resolve()))


def adapter_hashes(cfg: Recipe) -> dict[str, str]:
    """A SHA-256 of the adapter that a run begins from, and of its teacher's, by the settings' names."""
    named = {"adapter.path": cfg.adapter.path, "teacher.adapter": cfg.teacher.adapter if cfg.teacher else None}
    files = {name: weights_file(Path(path)) for name, path in named.items() if path is not None}
    return {name: hash_of(weights) for name, weights in files.items() if weights is not None}


def keep_starting(cfg: AdapterConfig, run: Path) -> None:
    """See to it that the run has a copy of the adapter that it begins from, if it can be had."""
    if cfg.path is not None and Path(cfg.path).resolve() != (run / STARTING).resolve():
        put_starting(copy_starting(cfg, run), run)


def copy_starting(cfg: AdapterConfig, run: Path) -> Path | None:
    """Copy the adapter that the run begins from into its folder, under a hidden name.

    Returns the copy; None for a run that begins from no adapter, or whose adapter is not there.
    """
    weights = weights_file(Path(cfg.path)) if cfg.path is not None else None
    if weights is None:
        return None
    aside = run / PARTIAL
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for source in (weights, weights.with_name(CONFIG)):
        if source.is_file():
            shutil.copyfile(source, aside / source.name)
            sync(aside / source.name)
    sync(aside)
    return aside


def put_starting(copy: Path | None, run: Path) -> None:
    """Give a copy its name, in the place of another that may be there.

    The other one is deleted last: at whatever moment the process is killed, `with_kept` finds one of the two.
    """
    if copy is None:
        return
    final, former = run / STARTING, run / PUT_ASIDE
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)
        final.rename(former)
    copy.rename(final)
    sync(run)
    shutil.rmtree(former, ignore_errors=True)


def _begins_from(cfg: Recipe, path: str) -> Recipe:
    return with_settings(cfg, {"adapter.path": path})
