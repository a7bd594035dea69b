"""A run's folder: made for a new run, and read back by the commands that take a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.recipe import dump_recipe, load_recipe
from grpo.training.checkpoint import checkpoints

RECIPE = "recipe.yaml"


def create_run_folder(cfg: Recipe, overwrite: bool) -> Path:
    """The run's folder with the resolved recipe in it. With `overwrite` a former run there is deleted."""
    folder = check_run_folder(cfg, overwrite)
    if (folder / RECIPE).exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(dump_recipe(cfg))
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
    return folder


def check_run_folder(cfg: Recipe, overwrite: bool) -> Path:
    """Where the run will be. Raises UserError if another is there and not to be replaced."""
    assert cfg.output_dir is not None
    folder = Path(cfg.output_dir)
    if (folder / RECIPE).exists() and not overwrite:
        raise UserError(f"{folder} holds another run: name another folder (output_dir=...) or replace it (--overwrite)")
    return folder


def is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def open_run(folder: Path) -> tuple[Recipe, Path]:
    """A run's recipe and its newest checkpoint. Raises UserError for a run that has none yet."""
    cfg = load_recipe(folder / RECIPE)
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(f"{folder}: this run has no checkpoint yet")
    return cfg, found[-1]
