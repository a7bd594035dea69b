"""The terminal: a live view of the run, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo.data.prompts import last_text
from grpo.types import EvalMetrics, StepMetrics

WIDTH, SAMPLE = 60, 200
"""Of the reward's curve, in steps; and of a sample completion, in characters."""


class ConsoleLogger:
    """Shows each step, with reward, KL, length, speed and time left. Use it in a `with` block.

    A terminal shows how far the step's rollouts and updates are, the reward's curve, and the best completion of the
    last step besides.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._seen = 0
        self._began = 0.0
        self._rewards: list[float] = []
        self._progress = _View(
            TextColumn("{task.description:7}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("step", total=steps, numbers="")
        self._phase = self._progress.add_task("", total=1, numbers="", visible=False)
        self._now: tuple[str, int, int] = ("", 0, 0)

    def __enter__(self) -> ConsoleLogger:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show how far a phase of the step is, in a bar of its own."""
        if (phase, total) != self._now[::2] or done < self._now[1]:
            self._progress.reset(self._phase, description=phase, total=total, visible=True)
        self._now = (phase, done, total)
        self._progress.update(self._phase, completed=done)

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        if isinstance(record, EvalMetrics):
            fractions = "  ".join(f"{name} {value:.1%}" for name, value in record.values.items() if is_fraction(name))
            line = f"eval at step {record.step}: {fractions}  (n={record.n}{_failed(record)})"
            self._console.print(line, highlight=False, soft_wrap=True)
            return
        numbers = _numbers(record)
        if "reward" in record.values:
            self._rewards.append(record.values["reward"])
        self._progress.below = [Text(f"reward {sparkline(self._rewards[-WIDTH:])}"), *_sample(record)]
        self._progress.update(self._task, completed=record.step, numbers=numbers)
        if not self._console.is_terminal:
            left = self._left(record)
            self._console.print(f"step {record.step}/{self._steps}  {numbers}  {left}", highlight=False, soft_wrap=True)

    def _left(self, record: StepMetrics) -> str:
        now = time.monotonic()
        self._began = self._began or now - record.values["step_time"]
        self._seen += 1
        seconds = (now - self._began) / self._seen * (self._steps - record.step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"


class _View(Progress):
    """A progress bar with lines below it."""

    below: Sequence[RenderableType] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from self.below


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of bars, the lowest and the highest as far apart as bars go."""
    bars = "▁▂▃▄▅▆▇█"
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low or 1.0
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in values)


def _sample(record: StepMetrics) -> list[Text]:
    """The prompt and the text of the completion with the highest reward, each cut to a few lines."""
    rated = [
        (rollout.reward, group.task, rollout)
        for group in record.groups
        for rollout in group.rollouts
        if rollout.reward is not None
    ]
    if not rated:
        return []
    reward, task, rollout = max(rated, key=lambda one: one[0])
    prompt, text = (" ".join(part.split())[:SAMPLE] for part in (last_text(task.prompt), rollout.completion.text))
    return [Text(f"prompt {prompt}", style="dim"), Text(f"{reward:6.3f} {text}", style="dim")]


def _numbers(record: StepMetrics) -> str:
    values = record.values
    kl = f"  kl {values['kl']:.4f}" if "kl" in values else ""
    reward = f"{values['reward']:.3f}" if "reward" in values else "none"
    silent = values.get("updates_without_signal", 0) > 0 and values.get("grad_norm") == 0
    return (
        f"reward {reward}{kl}  length {values['completions/mean_length']:.0f}"
        f"  {values['rollout_tokens_per_second']:,.0f} tok/s"
        f"{'  no signal, weights unchanged' if silent else ''}"
    )


def before_and_after(before: EvalMetrics, after: EvalMetrics, started: str = "before") -> Group:
    """Both evaluations side by side, with 95 % intervals; `started` says what was measured first."""
    table = Table()
    for heading in ("", started, f"after step {after.step}" if after.step else "with the adapter"):
        table.add_column(heading)
    for name in after.values:
        if name in before.values:
            table.add_row(name, _with_interval(before, name), _with_interval(after, name))
    return Group(_heading(after), table, *_failures(before, after))


def single(metrics: EvalMetrics) -> Group:
    """One evaluation, with 95 % intervals."""
    table = Table(show_header=False)
    for name in metrics.values:
        table.add_row(name, _with_interval(metrics, name))
    return Group(_heading(metrics), table, *_failures(metrics))


def _heading(metrics: EvalMetrics) -> str:
    return f"held-out accuracy by {metrics.grader}, n={metrics.n}, 95 % intervals"


def _failures(*measured: EvalMetrics) -> list[str]:
    """A line that says how many gradings failed, if any did."""
    counts = [f"{metrics.failed_gradings:,}" for metrics in measured]
    any_failed = any(metrics.failed_gradings for metrics in measured)
    return [f"gradings that failed, which count as not right: {' and '.join(counts)}"] if any_failed else []


def _failed(metrics: EvalMetrics) -> str:
    count = metrics.failed_gradings
    return f", {count:,} grading{'s' if count > 1 else ''} failed" if count else ""


def _with_interval(metrics: EvalMetrics, name: str) -> str:
    form = ".1%" if is_fraction(name) else ".3f"
    low, high = metrics.intervals[name]
    return f"{metrics.values[name]:{form}}  ({low:{form}} to {high:{form}})"


def is_fraction(name: str) -> bool:
    """Whether an evaluation's value is a fraction, rather than a mean of what a reward says."""
    return name == "greedy" or name.startswith(("avg@", "pass@", "maj@"))
