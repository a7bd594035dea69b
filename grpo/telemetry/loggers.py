"""All the loggers that a recipe asks for, behind one function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from grpo.backend.hub import one_line
from grpo.config import Recipe
from grpo.plugins import find_function
from grpo.telemetry.console import ConsoleLogger
from grpo.telemetry.jsonl import JsonlLogger
from grpo.telemetry.tensorboard import TensorboardLogger
from grpo.telemetry.weights_and_biases import WandbLogger
from grpo.training.state import RunState
from grpo.types import EvalMetrics, Progress, StepMetrics

Log = Callable[[StepMetrics | EvalMetrics], None]

warn = logging.getLogger(__name__).warning


class Closing(Protocol):
    """A logger that has something to finish."""

    def log(self, record: StepMetrics | EvalMetrics) -> None: ...

    def close(self) -> None: ...


class Watched(Protocol):
    """Something that tells how far it is."""

    progress: Progress | None


def open_loggers(
    stack: ExitStack,
    cfg: Recipe,
    folder: Path,
    console: Console,
    run_id: str,
    watched: Sequence[Watched] = (),
    resumed: RunState | None = None,
) -> Log:
    """A function that tells them all; `stack` closes them. The files come first, so that nothing is lost.

    A terminal shows how far the `watched` are. `resumed` is the state that a run in this folder goes on from: what
    services have of later steps is taken back, where they can.

    What fails of the others is said once and left out: a service that is away must not end a run. Raises UserError for
    a logger of the recipe's own that is not there.
    """
    own = [find_function(use, "logger") for use in cfg.log.use]
    terminal = stack.enter_context(ConsoleLogger(console, cfg.optim.steps))
    if console.is_terminal:
        for one in watched:
            one.progress = terminal.progress
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    logs = [JsonlLogger(folder).log, _Guarded("the terminal", terminal.log).log]
    makers: dict[str, Callable[[], Closing]] = {}
    if cfg.log.wandb is not None:
        wandb = cfg.log.wandb
        makers["W&B"] = lambda: WandbLogger(wandb, cfg, folder, run_id, tell, resumed)
    if cfg.log.tensorboard:
        makers["TensorBoard"] = lambda: TensorboardLogger(folder, resumed)
    for name, maker in makers.items():
        guarded = _Guarded(name)
        guarded.open(maker)
        stack.callback(guarded.close)
        logs.append(guarded.log)
    for use, function in zip(cfg.log.use, own, strict=True):
        logs.append(_Guarded(f"logger {use}", function).log)

    def log(record: StepMetrics | EvalMetrics) -> None:
        for one in logs:
            one(record)

    return log


class _Guarded:
    """A logger whose failures are said once, after which it is left out."""

    def __init__(self, name: str, log: Callable[[Any], Any] | None = None) -> None:
        self._name, self._log = name, log
        self._close: Callable[[], None] | None = None

    def open(self, maker: Callable[[], Closing]) -> None:
        made = self._try(maker)
        if made is not None:
            self._log, self._close = made.log, made.close

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        log = self._log
        if log is not None:
            self._try(lambda: log(record))

    def close(self) -> None:
        if self._close is not None:
            self._try(self._close)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self._log = self._close = None
            warn("%s is left out from here on: %s: %s", self._name, type(error).__name__, one_line(error))
            return None
