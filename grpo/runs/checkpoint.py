"""Checkpoints: whole or not there at all, and never believed without their checksums."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from grpo import __version__
from grpo.errors import UserError
from grpo.model.joined import Joined, write_joined
from grpo.model.saved import CONFIG, check_finite
from grpo.runs.state import RunState
from grpo.training.state import Arrays

STATE, RECIPE, SUMS = "state.json", "recipe.yaml", "SHA256SUMS"
FORMAT = 1
"""Which form `state.json` has. Checkpoints without one were written before the set of their files was checked."""
ARRAYS = ".safetensors"
REPLACED = ".replaced"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Context:
    """What a checkpoint says about the run that wrote it, the same in all of them.

    `recipe` is the resolved recipe's text, `sources` a hash for each file of code that the recipe names or that those
    import, `adapter` what mlx-lm's `adapter_config.json` says. `plan` is what was decided of the `optim` settings that
    may be `auto`. `revisions` are the commits on the Hub that model and data were loaded at, `inputs` hashes of what
    else the run began from: rows of data, and the adapter of `adapter.path`.
    """

    recipe: str
    sources: Mapping[str, str]
    adapter: Mapping[str, Any]
    plan: Mapping[str, Any]
    revisions: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)


def save_checkpoint(folder: Path, state: RunState, context: Context, keep: int) -> Path:
    """Write `folder/step-NNNNNN` and drop all but the newest `keep` and the best. Returns its path.

    The files are written aside and synced, and appear under their name by one rename. The adapter in it is in mlx-lm's
    format: `mlx_lm.generate --adapter-path` takes the checkpoint's folder, and `sha256sum -c SHA256SUMS` checks it.
    Raises OSError where it cannot be written; what was there before is whole then.
    """
    final = checkpoint_path(folder, state.step)
    aside = folder / f".{final.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write(aside, state, context)
        for path in [*aside.iterdir(), aside]:
            sync(path)
        restore_replaced(folder)
        if final.exists():
            final.rename(folder / f".{final.name}{REPLACED}")
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        restore_replaced(folder)
    sync(folder)
    best = {checkpoint_path(folder, state.best.step)} if state.best else set()
    for old in sorted(set(checkpoints(folder)[:-keep]) - best):
        _drop(old)
    return final


def _drop(checkpoint: Path) -> None:
    """Delete a checkpoint that is not to be kept; where that fails, say so: what was written after it is whole."""
    try:
        shutil.rmtree(checkpoint)
    except OSError as error:
        log.warning("%s is not needed any more and could not be deleted: %s", checkpoint, error.strerror or error)


def restore_replaced(folder: Path) -> None:
    """Bring back a checkpoint that was put aside for another of its step which never came, or delete it if it did."""
    for old in folder.glob(f".step-*{REPLACED}"):
        final = folder / old.name[1:].removesuffix(REPLACED)
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def _write(folder: Path, state: RunState, context: Context) -> None:
    for name, arrays in state.trainer.arrays.items():
        _save_arrays(folder / f"{name}{ARRAYS}", arrays)
    about = {"sources": context.sources, "plan": context.plan, "revisions": context.revisions, "inputs": context.inputs}
    names = [CONFIG, *(f"{name}{ARRAYS}" for name in state.trainer.arrays), RECIPE]
    plain = {
        "format": FORMAT,
        **state.plain(),
        **{name: dict(value) for name, value in about.items()},
        "versions": versions(),
        "files": names,
    }
    (folder / CONFIG).write_text(json.dumps(context.adapter, indent=2) + "\n", encoding="utf-8")
    (folder / STATE).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(context.recipe, encoding="utf-8")
    (folder / SUMS).write_text("".join(_sum(folder, name) for name in [*names, STATE]), encoding="utf-8")


def versions() -> dict[str, str]:
    """The packages that numbers depend on. (Ours need not be installed: it may be on the path as a checkout.)"""
    return {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")} | {"grpo-mlx": __version__}


def _save_arrays(path: Path, arrays: Arrays) -> None:
    if isinstance(arrays, Joined):
        write_joined(path, arrays)
        return
    try:
        mx.save_safetensors(str(path), dict(sorted(arrays.items())))  # sorted: equal states make equal files
    except RuntimeError as error:  # MLX's word for a disk that is full or gone
        raise OSError(f"{path.name}: {error}") from error


def _sum(folder: Path, name: str) -> str:
    """A file's line in the checksums, as `sha256sum` prints it."""
    return f"{hash_of(folder / name)}  {name}\n"


def hash_of(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a step's checkpoint lies."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, sound or not. (A copy that somebody named otherwise is not one.)"""
    found = (path for path in folder.glob("step-*") if path.is_dir())
    return sorted((path for path in found if path == checkpoint_path(folder, _number(path))), key=_number)


def _number(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None when it holds exactly the files that were written, under its own name.

    `SHA256SUMS` must be, to the letter, what it would be for the files that are there now; `state.json`, which is among
    them, says which files there are, so that a shorter list is not believed. Hidden files count as not there: file
    managers write some of their own.
    """
    try:
        lines = (checkpoint / SUMS).read_bytes().decode().splitlines(keepends=True)
        names = [line.rstrip("\n").partition("  ")[2] for line in lines]
        if STATE not in names or len(set(names)) < len(names):
            return f"{SUMS}: not what was written"
        if wrong := [name for name, line in zip(names, lines, strict=True) if _sum(checkpoint, name) != line]:
            return f"{', '.join(wrong)}: not what was written"
        return _other_files(checkpoint, names) or _other_step(checkpoint)
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except ValueError:  # no text, or a name that no file can have
        return f"{SUMS}: not what was written"


def _other_files(checkpoint: Path, summed: list[str]) -> str | None:
    """What is wrong with the set of a checkpoint's files, each of which is what was written."""
    state = read_state(checkpoint)
    if state.get("format") != FORMAT:
        return f"written by grpo {state['versions']['grpo-mlx']} in a form that grpo {__version__} does not read"
    written = [*state["files"], STATE]
    if summed != written:
        return f"{SUMS}: not what was written"
    there = {path.name for path in checkpoint.iterdir() if not path.name.startswith(".")}
    if more := sorted(there - {*written, SUMS}):
        return f"{', '.join(more)}: not part of this checkpoint; move it elsewhere"
    return None


def _other_step(checkpoint: Path) -> str | None:
    """What is wrong where the folder's name says another step than its state. Other names say nothing."""
    named, step = _number(checkpoint), step_of(checkpoint)
    return f"is named step {named} and was written after step {step}" if named not in (-1, step) else None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and a line for each newer one that was passed over."""
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint, passed_over
        passed_over.append(f"passed over {checkpoint}: {wrong}")
    return None, passed_over


def load_checkpoint(checkpoint: Path) -> tuple[RunState, Context]:
    """The run's state in a checkpoint, and its context. Raises UserError for one that is not what was written, and for
    one with NaN or infinities in its arrays."""
    if (wrong := damage(checkpoint)) is not None:
        raise UserError(f"checkpoint {checkpoint}: {wrong}")
    plain = read_state(checkpoint)
    arrays: dict[str, Any] = {
        name.removesuffix(ARRAYS): mx.load(str(checkpoint / name)) for name in plain["files"] if name.endswith(ARRAYS)
    }
    for name in arrays:  # each file is open from now on, and may be replaced
        read = cast("dict[str, mx.array]", mx.load(str(checkpoint / f"{name}{ARRAYS}")))
        one_by_one = ((path, read.pop(path)) for path in list(read))
        check_finite(one_by_one, f"checkpoint {checkpoint}: {name}{ARRAYS}")
    context = Context(
        recipe=(checkpoint / RECIPE).read_text(encoding="utf-8"),
        sources=plain["sources"],
        adapter=json.loads((checkpoint / CONFIG).read_text(encoding="utf-8")),
        plan=plain["plan"],
        revisions=plain["revisions"],
        inputs=plain["inputs"],
    )
    return RunState.of(plain, arrays), context


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says: the run's state without its arrays, the hashes of its sources, the versions used."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def step_of(checkpoint: Path) -> int:
    """The training step that a checkpoint was written after."""
    return int(read_state(checkpoint)["step"])


def drop_after(folder: Path, step: int) -> list[Path]:
    """Delete the checkpoints of later steps: a run that goes on from here will write its own. Returns them."""
    later = [path for path in checkpoints(folder) if _number(path) > step]
    for path in later:
        shutil.rmtree(path)
    return later


def sync(path: Path) -> None:
    """See a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
