"""All the loggers that a recipe asks for, behind one function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from grpo.config import Recipe
from grpo.telemetry.console import ConsoleLogger
from grpo.telemetry.jsonl import JsonlLogger
from grpo.telemetry.weights_and_biases import WandbLogger
from grpo.types import EvalMetrics, StepMetrics


def open_loggers(
    stack: ExitStack, cfg: Recipe, folder: Path, console: Console
) -> Callable[[StepMetrics | EvalMetrics], None]:
    """A function that tells them all; `stack` closes them. The files come first, so that nothing is lost."""
    logs = [JsonlLogger(folder).log, stack.enter_context(ConsoleLogger(console, cfg.optim.steps)).log]
    if cfg.log.wandb is not None:
        wandb = WandbLogger(cfg.log.wandb, cfg, folder)
        stack.callback(wandb.close)
        logs.append(wandb.log)

    def log(record: StepMetrics | EvalMetrics) -> None:
        for one in logs:
            one(record)

    return log
