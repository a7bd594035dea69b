"""The terminal: a live view of the run, or plain lines if the output is not a terminal."""

from __future__ import annotations

import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from grpo.environments.shown import asked, transcript
from grpo.progress import RowCounts
from grpo.telemetry.progress import Phase
from grpo.telemetry.sent import best_of
from grpo.types import EvalMetrics, StepMetrics

WIDTH, SAMPLE = 60, 200
"""Maximum width of a spark line, in steps, and of a sample completion, in characters."""
WIDE = 100
"""Minimum number of terminal columns for progress bars."""
PHASE, LEFT, BAR = len("evaluation") + 1, len("99:59:59") + 1, 20 + len(" left") + 1
"""Columns for a phase's name, for the time left, and for the bar of a wide terminal, gaps included."""
LATELY = 20
"""Number of recent steps whose mean time gives the time left."""
SILENCE = 30.0
"""Seconds without a line in a log file until the current phase gets a line."""


class ConsoleLogger:
    """Shows each step, with reward, KL, length, speed and time left. Use it in a `with` block.

    A terminal also shows the current phase of the step, spark lines of reward and length, and the best completion of
    the last step. A narrow terminal drops the least important parts first. A log file gets one line per step, and a
    line about a phase that takes long.
    """

    def __init__(self, console: Console, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns the time in seconds."""
        self._console, self._steps, self._clock = console, steps, clock
        self._printed = clock()
        self._ended, self._took = clock(), deque[float](maxlen=LATELY)
        self._curves: dict[str, deque[float]] = {"reward": deque(maxlen=WIDTH), "length": deque(maxlen=WIDTH)}
        wide = console.width >= WIDE
        self._progress = _View(
            TextColumn("{task.description}"),
            TextColumn("{task.fields[count]}"),
            *([BarColumn(bar_width=20)] if wide else []),
            TextColumn("{task.fields[numbers]}"),
            _TimeLeft(clock, " left" if wide else ""),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("step", total=steps, count=f"0/{steps}", numbers="", ends=None)
        self._bar = self._progress.add_task("", total=1, visible=False, count="", numbers="", ends=None)
        self._phase: Phase | None = None

    def __enter__(self) -> ConsoleLogger:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.update(self._bar, visible=False)  # the last phase is over
        self._progress.stop()

    def progress(self, phase: str, done: int, total: int, rows: RowCounts | None = None) -> None:
        """Show the progress of a phase: as a bar, or as a line in a log file without a line for `SILENCE` seconds."""
        now = self._clock()
        if self._phase is None or not self._phase.goes_on(phase, done):
            self._phase = Phase(phase, done, now)
            self._progress.reset(self._bar, description=phase, visible=True, count="", numbers="", ends=None)
        parts = self._phase.report(done, total, now, rows)
        numbers = self._fitting(parts)
        self._progress.update(self._bar, completed=done, total=total, numbers=numbers)
        if not self._console.is_terminal and now - self._printed >= SILENCE:
            self._print(f"{phase}: {parts[0]}", *parts[1:])

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        if isinstance(record, EvalMetrics):
            parts = [f"{name} {value:.1%}" for name, value in record.values.items() if is_fraction(name)]
            first, *others = [*parts, f"(n={record.n}{_failed(record)})"]
            self._print(f"eval at step {record.step}: {first}", *others)
            return
        parts, count = _parts(record), f"{record.step}/{self._steps}"
        for curve, name in (("reward", "reward"), ("length", "completions/mean_length")):
            self._curves[curve].extend([record.values[name]] if name in record.values else [])
        self._progress.below = [*self._sparks(), *_sample(record, 2 * self._console.width)]
        left = self._seconds_left(record)
        ends = self._clock() + left
        numbers = self._fitting(parts)
        self._progress.update(self._task, completed=record.step, count=count, numbers=numbers, ends=ends)
        if not self._console.is_terminal:
            self._print(f"step {count}", *parts, f"{_duration(left)} left")

    def _print(self, *parts: str) -> None:
        self._printed = self._clock()
        print_parts(self._console, parts)

    def _fitting(self, parts: Sequence[str]) -> str:
        """The leading parts that fit next to the other columns of the line, at least one part."""
        width, count = self._console.width, 2 * len(str(self._steps)) + 2
        room = width - PHASE - count - LEFT - (BAR if width >= WIDE else 0)
        fit = [n for n in range(1, len(parts) + 1) if len("  ".join(parts[:n])) <= room]
        return "  ".join(parts[: max(fit, default=1)])

    def _sparks(self) -> list[Text]:
        """Spark lines of the last steps, each with its lowest and highest value."""
        width, lines = self._console.width - 24, []
        for name, curve in self._curves.items():
            values = list(curve)[-max(width, 8) :]
            if len(values) > 1 or (values and name == "reward"):
                form = ".3f" if name == "reward" else ".0f"
                bounds = f"  {min(values):{form}} to {max(values):{form}}" if len(values) > 1 else ""
                lines.append(Text(f"{name} {sparkline(values)}{bounds}", overflow="crop", no_wrap=True))
        return lines

    def _seconds_left(self, record: StepMetrics) -> float:
        """The estimated time left, from the mean time between recent steps, evaluations and checkpoints included.

        `grpo runs --follow` may show several steps at once; then only the time within each step is known.
        """
        now, step_time = self._clock(), record.values["step_time"]
        self._took.append(max(step_time, now - self._ended) if self._took else step_time)
        self._ended = now
        return sum(self._took) / len(self._took) * (self._steps - record.step)


class _TimeLeft(ProgressColumn):
    """The time until the moment `ends` of a task; without `ends`, an estimate from the speed so far."""

    def __init__(self, clock: Callable[[], float], after: str) -> None:
        super().__init__()
        self._clock, self._after = clock, after

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        seconds = task.time_remaining if ends is None else max(0.0, ends - self._clock())
        return Text("" if seconds is None else f"{_duration(seconds)}{self._after}", style="progress.remaining")


def _duration(seconds: float) -> str:
    """A duration as `1:05`, or as `2:00:07` from one hour on."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class _View(Progress):
    """A progress bar with lines below it."""

    below: Sequence[RenderableType] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from self.below


def print_parts(console: Console, parts: Sequence[str]) -> None:
    """Print parts on one line; on a narrow terminal, on several lines broken between parts."""
    for line in _lines(parts, console.width) if console.is_terminal else ["  ".join(parts)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_wrapped(console: Console, line: str) -> None:
    """Print a line of prose; on a terminal, wrapped between words."""
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
    """Values as a row of bars, scaled so that the lowest value has the lowest bar and the highest the full bar."""
    bars = "▁▂▃▄▅▆▇█"
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low or 1.0
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in values)


def _sample(record: StepMetrics, most: int) -> list[Text]:
    """The prompt and the text of the completion with the highest reward, each truncated to `most` characters."""
    if (best := best_of(record)) is None:
        return []
    task, rollout = best
    shown = (asked(task, rollout.trajectory), transcript(rollout))
    prompt, text = (" ".join(part.split())[: min(SAMPLE, most)] for part in shown)
    return [Text(f"prompt {prompt}", style="dim"), Text(f"{rollout.reward:6.3f} {text}", style="dim")]


def _parts(record: StepMetrics) -> list[str]:
    """A step's numbers, most important first."""
    values = record.values
    parts = [f"reward {values['reward']:.3f}"] if "reward" in values else []
    if not parts and "teacher/kl" not in values:
        parts = ["reward none"]
    parts += [f"kl {values['kl']:.4f}"] if "kl" in values else []
    parts += [f"teacher kl {values['teacher/kl']:.4f}"] if "teacher/kl" in values else []
    parts += [f"length {values['completions/mean_length']:.0f}"]
    parts += [f"{values['rollout_tokens_per_second']:,.0f} tok/s{_drafts(values)}"]
    silent = values.get("updates_without_signal", 0) > 0 and values.get("grad_norm") == 0
    return [*parts, *(["no signal, weights unchanged"] if silent else [])]


def _drafts(values: Mapping[str, float]) -> str:
    """The speedup from drafts, and the accepted drafts per row and decoding step with drafts. Empty without drafts."""
    if values.get("speculation/width", 1.0) <= 1:
        return ""
    gain = f"{values['speculation/gain']:.2f} × as fast, " if "speculation/gain" in values else ""
    return f" (drafts: {gain}{values['speculation/accepted']:.1f} accepted per decoding step)"


def before_and_after(before: EvalMetrics, after: EvalMetrics, started: str = "before") -> Group:
    """A table of both evaluations, with 95 % intervals; `started` is the heading of the first."""
    table = Table()
    for heading in ("", started, f"after step {after.step}" if after.step else "with the adapter"):
        table.add_column(heading, overflow="fold")  # never truncate a metric's name
    for name in after.values:
        if name in before.values:
            table.add_row(name, _with_interval(before, name), _with_interval(after, name))
    return Group(_heading(after), table, *_failures(before, after))


def single(metrics: EvalMetrics) -> Group:
    """A table of one evaluation, with 95 % intervals."""
    table = Table(show_header=False)
    table.add_column(overflow="fold")
    for name in metrics.values:
        table.add_row(name, _with_interval(metrics, name))
    return Group(_heading(metrics), table, *_failures(metrics))


def _heading(metrics: EvalMetrics) -> str:
    return f"held-out accuracy by {metrics.grader}, n={metrics.n}, 95 % intervals"


def _failures(*measured: EvalMetrics) -> list[str]:
    """A line with the number of failed gradings; nothing if none failed."""
    counts = [f"{metrics.failed_gradings:,}" for metrics in measured]
    any_failed = any(metrics.failed_gradings for metrics in measured)
    return [f"failed gradings, which count as wrong answers: {' and '.join(counts)}"] if any_failed else []


def _failed(metrics: EvalMetrics) -> str:
    count = metrics.failed_gradings
    return f", {count:,} grading{'s' if count > 1 else ''} failed" if count else ""


def _with_interval(metrics: EvalMetrics, name: str) -> str:
    form = ".1%" if is_fraction(name) else ".3f"
    low, high = metrics.intervals[name]
    return f"{metrics.values[name]:{form}}  ({low:{form}} to {high:{form}})"


def is_fraction(name: str) -> bool:
    """Whether an evaluation's value is a fraction of right answers, rather than a mean score."""
    return name == "greedy" or name.startswith(("avg@", "pass@", "maj@"))
