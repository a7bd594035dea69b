"""Checkpoints: whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from grpo.model.adapters import Adapters

STATE = "state.json"


def save_checkpoint(folder: Path, step: int, adapters: Adapters, keep: int) -> Path:
    """Write `folder/step-NNNNNN` and drop all but the newest `keep`. Returns its path.

    The files are written aside and synced, and appear under their name by one rename. The adapter in it is in
    mlx-lm's format: `mlx_lm.generate --adapter-path` takes the checkpoint's folder.
    """
    final = checkpoint_path(folder, step)
    aside = folder / f".{final.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        adapters.save(aside)
        (aside / STATE).write_text(json.dumps({"step": step}) + "\n")
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a step's checkpoint lies."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def step_of(checkpoint: Path) -> int:
    """The training step that a checkpoint was written after."""
    return int(json.loads((checkpoint / STATE).read_text())["step"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
