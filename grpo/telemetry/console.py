"""The terminal: a live progress line, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from grpo.types import EvalMetrics, StepMetrics


class ConsoleLogger:
    """Shows each step, with reward, KL, length, speed and time left. Use it in a `with` block."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._began: float | None = None
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, numbers="")

    def __enter__(self) -> ConsoleLogger:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        if isinstance(record, EvalMetrics):
            fractions = "  ".join(f"{name} {value:.1%}" for name, value in record.values.items())
            self._console.print(f"eval at step {record.step}: {fractions}  (n={record.n})", highlight=False)
            return
        numbers = _numbers(record)
        self._progress.update(self._task, completed=record.step, numbers=numbers)
        if not self._console.is_terminal:
            left = self._left(record)
            self._console.print(f"step {record.step}/{self._steps}  {numbers}  {left}", highlight=False, soft_wrap=True)

    def _left(self, record: StepMetrics) -> str:
        now = time.monotonic()
        if self._began is None:
            self._began = now - record.values["step_time"]
        seconds = (now - self._began) / record.step * (self._steps - record.step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


def _numbers(record: StepMetrics) -> str:
    values = record.values
    kl = f"  kl {values['kl']:.4f}" if "kl" in values else ""
    return (
        f"reward {values['reward']:.3f}{kl}  length {values['completions/mean_length']:.0f}"
        f"  {values['rollout_tokens_per_second']:,.0f} tok/s"
    )


def before_and_after(before: EvalMetrics, after: EvalMetrics) -> Table:
    """Both evaluations side by side, with 95 % intervals."""
    table = Table(title=f"Held-out accuracy, n={after.n}, 95 % intervals", title_justify="left")
    table.add_column("")
    table.add_column("before")
    table.add_column(f"after step {after.step}")
    for name in after.values:
        table.add_row(name, _with_interval(before, name), _with_interval(after, name))
    return table


def single(metrics: EvalMetrics) -> Table:
    """One evaluation, with 95 % intervals."""
    table = Table(title=f"Held-out accuracy, n={metrics.n}, 95 % intervals", title_justify="left", show_header=False)
    for name in metrics.values:
        table.add_row(name, _with_interval(metrics, name))
    return table


def _with_interval(metrics: EvalMetrics, name: str) -> str:
    low, high = metrics.intervals[name]
    return f"{metrics.values[name]:.1%}  ({low:.1%} to {high:.1%})"
