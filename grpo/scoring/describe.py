"""Describes rewards in text: what a reward grades, which arguments it takes, and the results of its test."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Sequence

from grpo.config.judge import JudgeConfig
from grpo.config.rewardmodel import RewardModelConfig
from grpo.errors import UserError
from grpo.plugins import Function, Located
from grpo.scoring.arguments import ENVIRONMENTS, GIVEN, HOOKS, is_factory
from grpo.scoring.cases import Report, Tried
from grpo.scoring.text import counted

WIDTH = 100


def describe(located: Located) -> list[str]:
    """Lines with what a reward grades, the columns it reads, and the arguments it takes."""
    try:
        function = located.load()
    except UserError as error:
        return [f"{located.name:<14} {error}"]
    doc = inspect.getdoc(sys.modules[function.__module__]) or inspect.getdoc(function) or "(no description)"
    lines = [f"{located.name:<14} {doc.splitlines()[0]}"]
    columns, arguments = _columns(function), _arguments(function)
    if columns:
        lines.append(f"{'':<14} columns: {', '.join(columns)}")
    if arguments:
        lines += textwrap.wrap(
            f"kwargs: {', '.join(arguments)}", WIDTH, initial_indent=" " * 15, subsequent_indent=" " * 23
        )
    return lines


def describe_models() -> list[str]:
    """Lines about the models that a recipe's `use` may name instead of a function, and their arguments."""
    judge, model = JudgeConfig.model_fields, RewardModelConfig.model_fields
    return [
        f"{'judge':<14} The model in training, as it was at the start: the probability that it answers Yes.",
        f"{'':<14} kwargs: {', '.join(judge)}",
        f"{'model:NAME':<14} The score of a reward model: a sequence classifier with one label (Hub or folder).",
        f"{'':<14} kwargs: {', '.join(model)}",
    ]


def report_lines(report: Report) -> list[str]:
    """Lines with each failed case, the fuzz's failures (one line per distinct error), and the totals."""
    lines = [
        f"case {place} ({_short(tried.completion)}): {tried.wrong}"
        for place, tried in enumerate(report.cases, 1)
        if tried.wrong is not None
    ]
    alike: dict[str, list[Tried]] = {}
    for tried in report.fuzz:
        if tried.wrong is not None:
            alike.setdefault(tried.wrong, []).append(tried)
    for wrong, (first, *more) in alike.items():
        lines.append(f"{_short(first.completion)}{f' and {len(more)} more' if more else ''}: {wrong}")
    right = sum(tried.wrong is None for tried in report.cases)
    lines.append(f"cases  {right} of {len(report.cases)} right" if report.cases else "cases  none")
    failed = sum(tried.wrong is not None for tried in report.fuzz)
    if report.fuzz:
        lines.append(f"fuzz   {counted(len(report.fuzz))}, {counted(failed, 'failure')}; {_latency(report.fuzz)}")
    if report.together is not None:
        lines.append(f"several completions in one call, as in a run: {report.together}")
    if report.all_none:
        lines.append(
            "warning: the reward returned None for every completion. None means that a reward does not apply, so a run "
            "would learn nothing from it: return a number, or provide the column that it reads (CASES, --column)"
        )
    return lines


def _latency(tried: Sequence[Tried]) -> str:
    slowest = max(tried, key=lambda call: call.seconds)
    ordered = sorted(call.seconds for call in tried)
    p50, p95 = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.95))
    return f"latency p50 {1000 * p50:.2f} ms, p95 {1000 * p95:.2f} ms, longest {1000 * slowest.seconds:.0f} ms on " + (
        _short(slowest.completion)
    )


def _short(completion: object) -> str:
    text = repr(completion)
    return text if len(text) <= 60 else f"{text[:44]}… ({len(text):,} characters)"


def _columns(function: Function) -> list[str]:
    """The columns of the dataset that the function requires."""
    if is_factory(function):
        return []
    return [
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and name not in (*GIVEN, *HOOKS, ENVIRONMENTS)
    ]


def _arguments(function: Function) -> list[str]:
    factory = is_factory(function)
    return [
        name if p.default is p.empty else f"{name}={_value(p.default)}"
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is not p.VAR_KEYWORD
        and name not in (*GIVEN, *HOOKS, ENVIRONMENTS)
        and (factory or p.default is not p.empty)
    ]


def _value(default: object) -> str:
    text = repr(default)
    return text if len(text) <= 48 else "..."
