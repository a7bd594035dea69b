"""A run's folder: made for a new run, and read back by the commands that take a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.recipe import dump_recipe
from grpo.training.checkpoint import checkpoints

RECIPE, METRICS, CHECKPOINTS = "recipe.yaml", "metrics.jsonl", "checkpoints"
NOT_FINITE = "not_finite"
"""Where the batches of updates are that were skipped."""
WRITTEN = (METRICS, "eval.jsonl", CHECKPOINTS, NOT_FINITE, "wandb", RECIPE)
"""What a run writes into its folder, and all that `--overwrite` deletes there.

The order in which it is put aside, and in reverse brought back: with the recipe there, all of it is; with the metrics
back, all of it is. So a process that is killed in between leaves no doubt about whose files are whose.
"""
FORMER = ".former"
HEADER = "# This run's recipe as it was resolved, written by grpo train.\n"


@contextmanager
def run_folder(cfg: Recipe, overwrite: bool) -> Iterator[Path]:
    """The folder of a new run, for a `with` block, with the resolved recipe in it.

    With `overwrite` a former run there is put aside while the block runs. It is gone for good only if the new one has
    its first step on record; a block that fails before that leaves everything as it was.
    """
    folder = check_run_folder(cfg, overwrite)
    former = folder / FORMER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _move_run(folder, former)
        (folder / RECIPE).write_text(HEADER + dump_recipe(cfg), encoding="utf-8")
    except BaseException as error:
        if former.is_dir():
            (folder / RECIPE).unlink(missing_ok=True)
            _move_run(former, folder)
        if isinstance(error, OSError):
            raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
        raise
    try:
        yield folder
    finally:
        _settle(folder)
        if not any(folder.iterdir()) and folder.resolve() != Path.cwd():
            folder.rmdir()


def _settle(folder: Path) -> None:
    """Of two runs in a folder, keep the newer if it has a step on record, or else bring back the former."""
    former = folder / FORMER
    if (folder / METRICS).exists():
        shutil.rmtree(former, ignore_errors=True)
        return
    if not former.is_dir() or (former / RECIPE).exists():  # or else the former run was not aside in full yet
        _delete_run(folder)
    _move_run(former, folder)


def _move_run(source: Path, target: Path) -> None:
    """Move what a run wrote, and nothing else, from one folder to another."""
    names = [name for name in WRITTEN if (source / name).exists()]
    if names:
        target.mkdir(exist_ok=True)
    for name in reversed(names) if source.name == FORMER else names:
        (source / name).rename(target / name)
    if source.name == FORMER and source.is_dir():
        source.rmdir()


def _delete_run(folder: Path) -> None:
    for name in WRITTEN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_run_folder(cfg: Recipe, overwrite: bool) -> Path:
    """Where the run will be. Raises UserError if there is another, not to be replaced, or files that are no run's."""
    assert cfg.output_dir is not None
    folder = Path(cfg.output_dir)
    if (folder / FORMER).is_dir():  # a run that was to replace another was killed
        _settle(folder)
    theirs = [name for name in WRITTEN if (folder / name).exists()]
    if is_run(folder) and not overwrite:
        raise UserError(f"{folder} holds another run: name another folder (output_dir=...) or replace it (--overwrite)")
    if theirs and not is_run(folder):
        raise UserError(f"output_dir: {folder} has a {theirs[0]} that no run of ours wrote: name another folder")
    return folder


def is_run(folder: Path) -> bool:
    """Whether a run wrote there: a recipe with the header of the run's own copy."""
    try:
        return (folder / RECIPE).read_text(encoding="utf-8").startswith(HEADER)
    except (OSError, ValueError):
        return False


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run. Raises UserError for a run that has none yet."""
    found = checkpoints(folder / CHECKPOINTS)
    if not found:
        raise UserError(f"{folder}: this run has no checkpoint yet")
    return found[-1]
