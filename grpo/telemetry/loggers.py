"""Opens the loggers of a recipe behind one function."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from grpo.backend.hub import one_line
from grpo.backend.imports import extra
from grpo.config import LogConfig, Recipe
from grpo.errors import UserError
from grpo.plugins import Function, find_function
from grpo.progress import Progress, RowCounts
from grpo.runs.loop import Log
from grpo.runs.state import RunState
from grpo.telemetry.console import ConsoleLogger
from grpo.telemetry.jsonl import JsonlLogger
from grpo.telemetry.progress import NowFile
from grpo.telemetry.tensorboard import TensorboardLogger
from grpo.telemetry.trackio import TrackioLogger
from grpo.telemetry.weights_and_biases import WandbLogger
from grpo.types import EvalMetrics, StepMetrics

warn = logging.getLogger(__name__).warning


class Closing(Protocol):
    """A logger that must be closed at the end."""

    def log(self, record: StepMetrics | EvalMetrics) -> None: ...

    def close(self) -> None: ...


class Watched(Protocol):
    """An object that reports its progress."""

    progress: Progress | None


def find_loggers(cfg: LogConfig) -> list[Function]:
    """The functions in `log.use`; also checks that the packages of the other loggers can be imported. Opens nothing.

    Raises UserError for a function that is missing or does not take one record, and for a package that cannot be
    imported.
    """
    for is_on, package, key in (
        (cfg.wandb is not None, "wandb", "log.wandb"),
        (cfg.tensorboard, "tensorboardX", "log.tensorboard"),
    ):
        if is_on:
            try:
                importlib.import_module(package)
            except Exception as error:  # a broken package may raise anything
                raise UserError(
                    f"{key}: the package {package} cannot be imported ({one_line(error)}): reinstall it, or remove "
                    f"{key}"
                ) from error
    if cfg.trackio is not None:
        with extra("trackio", "log.trackio"):
            importlib.import_module("trackio")
    found = [find_function(use, "logger") for use in cfg.use]
    for use, function in zip(cfg.use, found, strict=True):
        try:
            inspect.signature(function).bind(None)
        except TypeError as error:
            raise UserError(f"logger {use!r}: {error}; grpo calls it with one StepMetrics or EvalMetrics") from None
        except ValueError:  # a builtin has no signature
            continue
    return found


def open_loggers(
    stack: ExitStack,
    cfg: Recipe,
    folder: Path,
    console: Console,
    run_id: str,
    watched: Sequence[Watched] = (),
    own: Sequence[Function] | None = None,
    resumed: RunState | None = None,
) -> Log:
    """A function that passes a record to all loggers; `stack` closes them. Files come first, so that no record is lost.

    The terminal and `grpo runs --follow` show the progress of `watched`. `own` has the functions of `log.use` if
    `find_loggers` was called before. `resumed` is the state from which a run in this folder resumes: services remove
    later steps, if they can.

    A logger that fails is disabled with one warning: an unavailable service must not end a run. Raises UserError for a
    function of `log.use` that is missing.
    """
    own = find_loggers(cfg.log) if own is None else own
    terminal = stack.enter_context(ConsoleLogger(console, cfg.optim.steps))
    now, shown = NowFile(folder), _Guarded("progress on the terminal", lambda args: terminal.progress(*args))
    stack.callback(now.close)

    def progress(phase: str, done: int, total: int, rows: RowCounts | None = None, /) -> None:
        shown.log((phase, done, total, rows))
        now.progress(phase, done, total, rows)

    for watched_object in watched:
        watched_object.progress = progress
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    logs = [JsonlLogger(folder).log, _Guarded("the terminal", terminal.log).log]
    makers: dict[str, Callable[[], Closing]] = {}
    if cfg.log.wandb is not None:
        wandb = cfg.log.wandb
        makers["W&B"] = lambda: WandbLogger(wandb, cfg, folder, run_id, tell, resumed)
    if cfg.log.tensorboard:
        makers["TensorBoard"] = lambda: TensorboardLogger(folder, resumed, cfg.log.completions is not None)
    if cfg.log.trackio is not None:
        trackio = cfg.log.trackio
        makers["Trackio"] = lambda: TrackioLogger(trackio, cfg, folder, tell, resumed is not None)
    for name, maker in makers.items():
        guarded = _Guarded(name)
        guarded.open(maker)
        stack.callback(guarded.close)
        logs.append(guarded.log)
    for use, function in zip(cfg.log.use, own, strict=True):
        logs.append(_Guarded(f"logger {use}", function).log)

    def log(record: StepMetrics | EvalMetrics) -> None:
        for logger in logs:
            logger(record)

    return log


class _Guarded:
    """A logger that is disabled with one warning when it fails."""

    def __init__(self, name: str, log: Callable[[Any], Any] | None = None) -> None:
        self._name, self._log = name, log
        self._close: Callable[[], None] | None = None

    def open(self, maker: Callable[[], Closing]) -> None:
        made = self._try(maker)
        if made is not None:
            self._log, self._close = made.log, made.close

    def log(self, record: Any) -> None:
        log = self._log
        if log is not None:
            self._try(lambda: log(record))

    def close(self) -> None:
        if self._close is not None:
            self._try(self._close)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (Exception, SystemExit) as error:  # a logger must not end the run
            self._log = self._close = None
            warn(
                "%s failed and is disabled for the rest of the run: %s: %s",
                self._name,
                type(error).__name__,
                one_line(error),
            )
            return None
