"""A run or a recipe measured on its held-out prompts, for `grpo eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo.errors import UserError
from grpo.plugins import find_recipe
from grpo.recipe import load_recipe
from grpo.training.checkpoint import RECIPE, step_of
from grpo.training.folder import is_run, newest_checkpoint
from grpo.training.setup import prepare
from grpo.types import EvalMetrics


def measure(target: str, overrides: Sequence[str]) -> tuple[EvalMetrics, EvalMetrics | None]:
    """The base model's evaluation and, for a run's folder, that of its newest checkpoint on the same prompts.

    Raises UserError for a recipe without an `eval` section.
    """
    folder = Path(target)
    checkpoint = newest_checkpoint(folder) if is_run(folder) else None
    if checkpoint is None and folder.is_dir():
        raise UserError(f"{target}: neither a run's folder nor a recipe")
    cfg = load_recipe(folder / RECIPE if checkpoint else find_recipe(target), overrides)
    if cfg.eval is None:
        raise UserError(f"{target}: the recipe has no eval section; add one, such as eval.split=test")
    trainer = prepare(cfg).trainer
    assert trainer.evaluate is not None
    before = trainer.evaluate(0)
    if checkpoint is None:
        return before, None
    trainer.policy.adapters.load(checkpoint)
    return before, trainer.evaluate(step_of(checkpoint))
