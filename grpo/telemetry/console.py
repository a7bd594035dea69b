"""The terminal: a live view of the run, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo.environments.shown import asked, transcript
from grpo.telemetry.progress import Phase
from grpo.telemetry.sent import best_of
from grpo.types import EvalMetrics, StepMetrics

WIDTH, SAMPLE = 60, 200
"""Of the reward's curve, in steps; and of a sample completion, in characters."""
WIDE = 100
"""Columns of a terminal that has room for bars."""
SILENCE = 30.0
"""Seconds without a line in a log file, after which the phase that is going on gets one."""


class ConsoleLogger:
    """Shows each step, with reward, KL, length, speed and time left. Use it in a `with` block.

    A terminal shows the phase that the step is in, the reward's curve, and the best completion of the last step
    besides; a log file gets a line on a phase that takes long.
    """

    def __init__(self, console: Console, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds."""
        self._console, self._steps, self._clock = console, steps, clock
        self._seen = 0
        self._began = 0.0
        self._printed = clock()
        self._rewards: list[float] = []
        wide = console.width >= WIDE
        self._progress = _View(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[count]}"),
            *([BarColumn(bar_width=20)] if wide else []),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            *([TextColumn("left")] if wide else []),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("step", total=steps, count=f"0/{steps}", numbers="")
        self._bar = self._progress.add_task("", total=1, count="", numbers="", visible=False)
        self._phase: Phase | None = None

    def __enter__(self) -> ConsoleLogger:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.update(self._bar, visible=False)  # the last phase is over
        self._progress.stop()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show how far a phase of the step is: in a bar of its own, or by a line if nothing was printed for long."""
        now = self._clock()
        if self._phase is None or not self._phase.goes_on(phase, done):
            self._phase = Phase(phase, done, now)
            self._progress.reset(self._bar, description=phase, visible=True, count="", numbers="")
        text = self._phase.report(done, total, now)
        self._progress.update(self._bar, completed=done, total=total, numbers=text)
        if not self._console.is_terminal and now - self._printed >= SILENCE:
            self._print(f"{phase}: {text}")

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        if isinstance(record, EvalMetrics):
            parts = [f"{name} {value:.1%}" for name, value in record.values.items() if is_fraction(name)]
            first, *others = [*parts, f"(n={record.n}{_failed(record)})"]
            self._print(f"eval at step {record.step}: {first}", *others)
            return
        numbers = _numbers(record)
        if "reward" in record.values:
            self._rewards.append(record.values["reward"])
        self._progress.below = [Text(f"reward {sparkline(self._rewards[-WIDTH:])}"), *_sample(record)]
        count = f"{record.step}/{self._steps}"
        self._progress.update(self._task, completed=record.step, count=count, numbers=numbers)
        if not self._console.is_terminal:
            self._print(f"step {count}", numbers, self._left(record))

    def _print(self, *parts: str) -> None:
        self._printed = self._clock()
        print_parts(self._console, parts)

    def _left(self, record: StepMetrics) -> str:
        now = self._clock()
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


def print_parts(console: Console, parts: Sequence[str]) -> None:
    """Print parts on one line; on a terminal that is too narrow, on several that begin between two parts."""
    for line in _lines(parts, console.width) if console.is_terminal else ["  ".join(parts)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_wrapped(console: Console, line: str) -> None:
    """Print a line of prose, on a terminal in lines that end between two words."""
    width, indent = console.width if console.is_terminal else sys.maxsize, "  "
    for part in textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False):
        console.print(part, highlight=False, markup=False, soft_wrap=True)


def _lines(parts: Sequence[str], width: int) -> Iterator[str]:
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            yield line
            line = f"  {part}"
        else:
            line = f"{line}  {part}"
    yield line


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of bars, the lowest and the highest as far apart as bars go."""
    bars = "▁▂▃▄▅▆▇█"
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low or 1.0
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in values)


def _sample(record: StepMetrics) -> list[Text]:
    """The prompt and the text of the completion with the highest reward, each cut to a few lines."""
    if (best := best_of(record)) is None:
        return []
    task, rollout = best
    shown = (asked(task, rollout.trajectory), transcript(rollout))
    prompt, text = (" ".join(part.split())[:SAMPLE] for part in shown)
    return [Text(f"prompt {prompt}", style="dim"), Text(f"{rollout.reward:6.3f} {text}", style="dim")]


def _numbers(record: StepMetrics) -> str:
    values = record.values
    kl = f"kl {values['kl']:.4f}  " if "kl" in values else ""
    kl += f"teacher kl {values['teacher/kl']:.4f}  " if "teacher/kl" in values else ""
    reward = f"reward {values['reward']:.3f}  " if "reward" in values else ""
    if not reward and "teacher/kl" not in values:
        reward = "reward none  "
    silent = values.get("updates_without_signal", 0) > 0 and values.get("grad_norm") == 0
    return (
        f"{reward}{kl}length {values['completions/mean_length']:.0f}"
        f"  {values['rollout_tokens_per_second']:,.0f} tok/s{_drafts(values)}"
        f"{'  no signal, weights unchanged' if silent else ''}"
    )


def _drafts(values: Mapping[str, float]) -> str:
    """How much faster drafts made the rollout, and how many of them a row took at a wide step, where there was one."""
    if values.get("speculation/width", 1.0) <= 1:
        return ""
    gain = f" {values['speculation/gain']:.2f} ×," if "speculation/gain" in values else ""
    return f" (drafts:{gain} +{values['speculation/accepted']:.1f} a wide step)"


def before_and_after(before: EvalMetrics, after: EvalMetrics, started: str = "before") -> Group:
    """Both evaluations side by side, with 95 % intervals; `started` says what was measured first."""
    table = Table()
    for heading in ("", started, f"after step {after.step}" if after.step else "with the adapter"):
        table.add_column(heading, overflow="fold")  # a metric's whole name
    for name in after.values:
        if name in before.values:
            table.add_row(name, _with_interval(before, name), _with_interval(after, name))
    return Group(_heading(after), table, *_failures(before, after))


def single(metrics: EvalMetrics) -> Group:
    """One evaluation, with 95 % intervals."""
    table = Table(show_header=False)
    table.add_column(overflow="fold")
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
