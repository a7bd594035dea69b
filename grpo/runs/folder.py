"""A run's folder: made for a new run, reopened for a resumed run, and read by the commands that take a run."""

from __future__ import annotations

import difflib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.config import Recipe
from grpo.errors import RunError, UserError
from grpo.recipes import dump_recipe
from grpo.runs.checkpoint import (
    RECIPE,
    STATE,
    checkpoint_path,
    checkpoints,
    damage,
    drop_after,
    newest_whole,
    read_state,
)
from grpo.runs.records import replace_text, rewind
from grpo.runs.starting import (
    COPIES,
    copy_adapters,
    drop_partial,
    keep_adapters,
    named_as_kept,
    put_copies,
)

METRICS, EVALUATIONS, CHECKPOINTS = "metrics.jsonl", "eval.jsonl", "checkpoints"
COMPLETIONS = "completions"
NOT_FINITE = "not_finite"
"""The folder for batches of updates that were skipped because they were not finite."""
ENDED = ".ended"
"""How a run ended, written by the run itself: a word, then the error of a run that failed. A killed run has none."""
NOW = ".now"
"""The file with the progress of the run's current phase, for commands that follow the run."""
UNTRAINED = "untrained"
"""The word in `ENDED` if a run made all its steps and applied no update."""
WORSE = "worse"
"""The word in `ENDED` if a run made all its steps and made the model worse (`grpo.runs.health`)."""
WRITTEN = (
    *(METRICS, EVALUATIONS, CHECKPOINTS, COMPLETIONS, NOT_FINITE, "tensorboard", "wandb", "report.html", ENDED),
    *(*COPIES, NOW, RECIPE),
)
"""Everything that a run writes into its folder, and everything that `--overwrite` deletes.

Files are moved aside in this order and restored in reverse. The recipe moves last and the metrics are restored last, so
after a kill in the middle of a move it is clear which run each file belongs to.
"""
FAILED = "failed_step.parquet"
"""The completions of a step or an evaluation in which a failing reward ended the run. The file stays even if the run
ended in its first step. It does not block the folder: the next run there deletes it."""
FORMER = ".former"
LOCK = ".lock"
HEADER = "# This run's recipe as it was resolved, written by grpo train.\n"
BUSY = "{}: another process is training in this folder: stop it, or choose another output_dir"

log = logging.getLogger(__name__)


@contextmanager
def run_folder(cfg: Recipe, overwrite: bool) -> Iterator[Path]:
    """The folder of a new run, with the resolved recipe in it, for a `with` block.

    With `overwrite`, a former run in the folder is moved aside while the block runs. It is deleted when the block ends,
    if the new run has recorded its first step; a block that fails earlier leaves the folder as it was.
    """
    folder = check_run_folder(cfg, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
    try:
        with _locked(folder):
            _begin(cfg, folder)
            try:
                yield folder
            finally:
                if folder.is_dir():
                    _settle(folder)
    finally:
        if folder.is_dir() and not any(folder.iterdir()) and folder.resolve() != Path.cwd():
            folder.rmdir()


def _begin(cfg: Recipe, folder: Path) -> None:
    """Move a former run aside and write the new run's recipe. On an error, leave the folder as it was."""
    former = folder / FORMER
    try:
        copies = copy_adapters(cfg, folder)  # they may be of the run that is put aside
        if failed_at_once(folder):
            _delete_run(folder)
        _move_run(folder, former)
        (folder / FAILED).unlink(missing_ok=True)
        (folder / RECIPE).write_text(recipe_text(cfg), encoding="utf-8")
        put_copies(copies, folder)
    except BaseException as error:
        drop_partial(folder)
        if former.is_dir():
            (folder / RECIPE).unlink(missing_ok=True)
            _move_run(former, folder)
        if isinstance(error, OSError):
            raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
        raise


@contextmanager
def resumed_folder(cfg: Recipe, step: int, evaluated: int, first: int = 1) -> Iterator[Path]:
    """The folder of a run that resumes after `step`, for a `with` block. Its last evaluation came after step
    `evaluated` (-1: none).

    Deletes what the folder holds of later steps, which the run repeats. The folder must have records of the steps from
    `first` (above 1 in a branch off another run) to `step`, once each: duplicates and gaps cause a warning.
    """
    assert cfg.output_dir is not None
    folder = Path(cfg.output_dir)
    with _locked(folder):
        try:
            _forget_after(folder, range(first, step + 1), evaluated)
            keep_adapters(cfg, folder)
            replace_text(folder / RECIPE, recipe_text(cfg))
        except OSError as error:
            raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
        yield folder


def _forget_after(folder: Path, steps: range, evaluated: int) -> None:
    step = steps.stop - 1
    rewind(folder / METRICS, steps, complete=True)
    rewind(folder / EVALUATIONS, range(evaluated + 1), complete=False)
    for name in (FAILED, ENDED, NOW):
        (folder / name).unlink(missing_ok=True)
    drop_after(folder / CHECKPOINTS, step)
    for path in (folder / COMPLETIONS).glob("step-*.parquet"):
        if path.stem > checkpoint_path(folder, step).name:
            path.unlink()


def restore_folder(folder: Path, recipe: str, cfg: Recipe) -> None:
    """Recreate a run's folder if it was deleted during the run, so that what is written from now on is found."""
    if not (folder / RECIPE).is_file():
        log.warning("%s was deleted during the run; grpo recreates it, without its former contents", folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / RECIPE, recipe)
        keep_adapters(cfg, folder)


def recipe_text(cfg: Recipe) -> str:
    """The text of a run's `recipe.yaml`."""
    return HEADER + dump_recipe(named_as_kept(cfg))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system releases it when the process ends, however it ends.

    Raises UserError if another process holds the lock.
    """
    path = folder / LOCK
    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(BUSY.format(folder)) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def taken_over(folder: Path, seconds: float = 20.0) -> Iterator[None]:
    """Hold the lock of a run whose first process was lost, for a `with` block.

    Raises RunError if that process still holds the lock after this many seconds: it is alive somewhere.
    """
    until = time.monotonic() + seconds
    with (folder / LOCK).open("a") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    raise RunError(
                        f"{folder}: process 0 is still alive and holds the folder's lock, so this process leaves it to "
                        "process 0 to save the last step"
                    ) from None
                time.sleep(0.1)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def is_running(folder: Path) -> bool:
    """Whether another process is training in the folder. (A process does not see its own lock.)"""
    try:
        file = (folder / LOCK).open("r+")
    except OSError:
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def _settle(folder: Path) -> None:
    """Of two runs in a folder, keep the newer if it has a record or a checkpoint, or else bring back the former.
    Without a former run, one that failed in its first step stays: it says why."""
    former = folder / FORMER
    in_part = former.is_dir() and not (former / RECIPE).exists()  # only a part of the former run was moved aside
    has_step = (folder / METRICS).exists() or (not in_part and bool(checkpoints(folder / CHECKPOINTS)))
    if has_step or (failed_at_once(folder) and not former.is_dir()):
        shutil.rmtree(former, ignore_errors=True)
        return
    if not in_part:
        _delete_run(folder)
    _move_run(former, folder)


def _move_run(source: Path, target: Path) -> None:
    """Move the files that a run wrote, and no others, from one folder to another."""
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


def check_run_folder(cfg: Recipe, overwrite: bool, dry: bool = False) -> Path:
    """The folder of the run. A `dry` run writes nothing, so it may use the folder of another run.

    Raises UserError if the folder holds a run that must not be overwritten, or files that no run wrote, or if it
    is not writable.
    """
    assert cfg.output_dir is not None
    folder = Path(cfg.output_dir)
    if not dry:
        if is_running(folder):
            raise UserError(BUSY.format(folder))
        if (folder / FORMER).is_dir():  # a run that replaced another was killed
            _settle(folder)
        if is_run(folder) and not (overwrite or failed_at_once(folder)):
            raise UserError(
                f"{folder} already holds a run: resume it (--resume), name another folder (output_dir=...) or replace "
                "the run (--overwrite)"
            )
    foreign = [name for name in WRITTEN if (folder / name).exists()]
    if foreign and not is_run(folder) and not (folder / FORMER).is_dir():
        raise UserError(f"output_dir: {folder} has a {foreign[0]} that no grpo run wrote: choose another folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not writable" if there.is_dir() else "is a file"
        raise UserError(f"output_dir: cannot write to {folder}: {there} {why}")
    return folder


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run's folder: it has a recipe with the header that grpo writes, and is not a checkpoint."""
    try:
        ours = (folder / RECIPE).read_text(encoding="utf-8").startswith(HEADER)
        return ours and not (folder / STATE).exists()
    except (OSError, ValueError):
        return False


def how_ended(folder: Path) -> tuple[str, str]:
    """The word on how a run ended, and its error; empty where the folder has none."""
    try:
        word, _, error = (folder / ENDED).read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return "", ""
    return word.strip(), error.strip()


def failed_at_once(folder: Path) -> bool:
    """Whether the folder holds a run that failed before it had a step on record or a checkpoint; the next run there
    replaces it."""
    has_step = (folder / METRICS).exists() or checkpoints(folder / CHECKPOINTS)
    return is_run(folder) and not has_step and how_ended(folder)[0] == "failed"


def check_is_run(folder: Path) -> None:
    """Raise UserError if `folder` is not a run's folder; the error says what it is, or which run was probably meant."""
    if is_run(folder):
        return
    above = next((path for path in (folder.parent, folder.parent.parent) if is_run(path)), None)
    if above is not None and folder.exists():
        raise UserError(f"{folder}: not a run's folder, but part of the run {above}: name the run")
    inside = sorted(path.name for path in folder.iterdir() if is_run(path)) if folder.is_dir() else []
    if inside:
        named = ", ".join(str(folder / name) for name in inside[:5])
        raise UserError(f"{folder}: not a run's folder; it contains runs: name one of them, such as {named}")
    if folder.exists():
        raise UserError(f"{folder}: not a run's folder: it has no recipe.yaml of a run")
    raise UserError(f"{folder}: there is no such folder.{_similar_run(folder)}".removesuffix("."))


def _similar_run(folder: Path) -> str:
    """` Did you mean RUN?` with the run next to `folder`, or in `runs`, whose name is most similar; "" for none."""
    places = [folder.parent, Path("runs")]
    runs = {path.name: path for place in places if place.is_dir() for path in place.iterdir() if is_run(path)}
    close = difflib.get_close_matches(folder.name, runs, n=1)
    return f" Did you mean {runs[close[0]]}?" if close else ""


def newest_checkpoint(folder: Path) -> Path:
    """The newest intact checkpoint of a run. Warns about newer damaged ones. Raises UserError if there is none."""
    found, skipped = newest_whole(folder / CHECKPOINTS)
    for line in skipped:
        log.warning("%s", line)
    if found is None:
        why = "all checkpoints of this run are damaged" if skipped else "this run has no checkpoint yet"
        raise UserError(f"{folder}: {why}")
    return found


def find_checkpoint(folder: Path, which: str) -> Path:
    """The checkpoint of a run that `which` names: `newest`, `best` or a step.

    Raises UserError if it does not exist or is damaged.
    """
    if which == "newest":
        return newest_checkpoint(folder)
    there = folder / CHECKPOINTS
    if which == "best":
        best = read_state(newest_checkpoint(folder))["best"]
        if best is None:
            raise UserError(f"{folder}: no evaluation has chosen a best checkpoint yet")
        found = checkpoint_path(there, best["step"])
    elif which.isdecimal():
        found = checkpoint_path(there, int(which))
    else:
        raise UserError(f"checkpoint {which!r}: expected newest, best or a step")
    if found not in checkpoints(there):
        known = ", ".join(str(int(path.name[5:])) for path in checkpoints(there))
        raise UserError(f"{folder}: no checkpoint of step {which}; existing checkpoints: {known or 'none'}")
    if (wrong := damage(found)) is not None:
        raise UserError(f"{found}: {wrong}")
    return found
