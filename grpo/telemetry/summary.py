"""Prints the plan before a run's first step, and the outcome after its last step."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from grpo.config import DataConfig, ModelConfig, RewardConfig
from grpo.planning.plan import Plan
from grpo.runs.loop import Outcome
from grpo.scoring.own import OwnTerms
from grpo.scoring.text import counted
from grpo.telemetry.console import before_and_after, print_wrapped
from grpo.types import FailureKind

NOUNS: dict[FailureKind, tuple[str, str]] = {
    "error": ("error", "errors"),
    "timeout": ("timeout", "timeouts"),
    "crash": ("crash", "crashes"),
    "memory": ("of memory", "of memory"),
}


def print_plan(
    console: Console,
    model: ModelConfig,
    data: DataConfig,
    rewards: Sequence[RewardConfig],
    device: str,
    plan: Plan,
    notes: Sequence[str],
    converses: bool = True,
) -> None:
    """Print the machine, model, data, rewards and plan. `converses`: whether there are environments or tools."""
    default = "the environment's own" if converses else "none"
    weighted = ", ".join(f"{reward.use} × {reward.weight:g}" for reward in rewards) or default
    lines = [device, f"{model.name} on {data.label}, rewards: {weighted}", *plan.lines(), *notes]
    for line in lines:
        print_wrapped(console, line)


def failure_lines(kinds: Mapping[FailureKind, Mapping[str, float]], own: Mapping[str, OwnTerms]) -> list[str]:
    """One line per reward with failures: the number of failed completions, by kind of failure. For environments and
    agents, which are in `own`, the number of failed conversations.

    `kinds` maps each kind of failure to counts by name.
    """
    lines = []
    for name in kinds["error"]:
        counts = {kind: int(by_name[name]) for kind, by_name in kinds.items()}
        if total := sum(counts.values()):
            talks = name in own
            what = f"{own[name].noun} {name!r} failed in" if talks else f"reward {name!r} failed on"
            shown = [f"{n:,} {NOUNS[kind][n != 1]}" for kind, n in counts.items() if n or kind in ("error", "timeout")]
            noun = "conversation" if talks else "completion"
            lines.append(f"{what} {counted(total, noun)}: {', '.join(shown)}")
    return lines


def print_outcome(
    console: Console, outcome: Outcome, folder: Path, example: str | None, failures: list[str], go_on: str
) -> None:
    """Print the table of accuracies, the failures, a warning if the model got worse, the adapter's path, and a command
    to try the adapter (unless nothing was trained).

    `example` is a shell-quoted prompt, or an option that names a row of the data; None if there is nothing to try.
    `go_on` is the command that resumes a stopped run.
    """
    state = outcome.state
    if state.before and state.after and state.after.step > state.before.step:
        console.print(before_and_after(state.before, state.after))
    lines = [*failures, *filter(None, [outcome.worse]), _ended(outcome)]
    if outcome.checkpoint and not outcome.untrained:
        lines.append(f"adapter  {outcome.checkpoint}")
        if example is not None:
            lines.append(f"try it   grpo generate {shlex.quote(str(folder))} {example}")
        if outcome.stopped_by is not None:
            lines.append(f"resume   {go_on}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _ended(outcome: Outcome) -> str:
    step = outcome.state.step
    if outcome.stopped_by is None and step and outcome.began == step:
        untrained = ", untrained" if outcome.untrained else ""
        return f"nothing was trained: the run had already finished after step {step}{untrained}"
    what = "stopped" if outcome.stopped_by is not None else "finished, untrained," if outcome.untrained else "finished"
    if not step:
        return f"{what} before the first step"
    silent = outcome.state.trainer.counts.get("steps_without_signal", 0)
    mostly = f"; {silent} of these {step} steps had no signal and changed nothing" if step / 2 <= silent < step else ""
    return f"{what} after step {step}{mostly}"
