"""Prints a replayed step."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo.data.prompts import last_text
from grpo.environments.shown import transcript
from grpo.tools.replay import Replay

SHOWN = (
    "reward",
    "reward_std",
    "loss",
    "grad_norm",
    "entropy",
    "kl",
    "teacher/kl",
    "clip_ratio/region_mean",
    "completions/mean_length",
)


def print_replay(console: Console, replay: Replay, groups: int, tokens: int) -> None:
    """Print the step's metrics, then `groups` prompts with their completions: reward, advantage, text, and the `tokens`
    tokens whose probability changed most."""
    metrics = replay.metrics
    for note in replay.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    numbers = [f"{name} {metrics.values[name]:.4g}" for name in SHOWN if name in metrics.values]
    console.print(f"step {metrics.step}  " + "  ".join(numbers), highlight=False, soft_wrap=True)
    place = 0
    for number, group in enumerate(metrics.groups):
        if number < groups:
            ago = f"{group.lag} step{'s' * (group.lag > 1)}"
            older = f" (replayed, sampled {ago} earlier)" if group.replayed else ""
            console.print(f"\n[bold]{escape(last_text(group.task.prompt))}[/bold]{older}", highlight=False)
            table = Table("reward", "advantage", "completion", f"ratios of the {tokens} tokens that changed most")
            for i, rollout in enumerate(group.rollouts, start=place):
                reward = "none" if rollout.reward is None else f"{rollout.reward:.3f}"
                moved = _moved(replay.tokens[i], replay.ratios[i], tokens)
                text = escape(transcript(rollout).strip())
                table.add_row(reward, f"{rollout.advantage:+.3f}", text, moved)
            console.print(table)
        place += len(group.rollouts)
    if len(metrics.groups) > groups:
        more = len(metrics.groups) - groups
        console.print(f"{more} more prompts: show them with --groups {len(metrics.groups)}", highlight=False)


def _moved(texts: list[str], ratios: list[float], count: int) -> str:
    """The `count` tokens whose ratio is farthest from 1, in text order, each with its ratio."""
    most = sorted(range(len(ratios)), key=lambda i: -abs(ratios[i] - 1))[:count]
    return "  ".join(f"{escape(repr(texts[i])[1:-1])} {ratios[i]:.3f}" for i in sorted(most))
