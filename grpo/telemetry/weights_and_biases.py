"""Weights & Biases, through its own package. Whatever happens to it, the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from grpo.config import Recipe, WandbConfig
from grpo.types import EvalMetrics, StepMetrics


class WandbLogger:
    """Logs under TRL's names with its prefixes, `train/` and `eval/`."""

    def __init__(self, cfg: WandbConfig, recipe: Recipe, folder: Path) -> None:
        self._run: Any = None
        self._guarded(lambda: self._start(cfg, recipe, folder))

    def _start(self, cfg: WandbConfig, recipe: Recipe, folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=cfg.project,
            mode=cfg.mode,
            name=folder.name,
            dir=folder,
            config=recipe.model_dump(mode="json"),
            settings={"silent": True},
        )

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        prefix = "eval" if isinstance(record, EvalMetrics) else "train"
        values = {f"{prefix}/{name}": value for name, value in record.values.items()}
        # The step is a value too: evaluations come at steps that have been logged already.
        self._guarded(lambda: self._run and self._run.log({**values, "train/global_step": record.step}))

    def close(self) -> None:
        self._guarded(lambda: self._run and self._run.finish())

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a service that is away must not end a run; it is said once
            self._run = None
            print(f"W&B is left out from here on: {type(error).__name__}: {error}", file=sys.stderr)
