"""A step's metrics, under TRL's names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import get_args

from grpo.agents.outcome import measured
from grpo.objective.metrics import FRESH, TOKENS
from grpo.scoring.applying import ALL, Applying
from grpo.training.update import Update
from grpo.types import FAILURES, FinishReason, Group, StepMetrics, Trajectory

SOLVED = 1.0
"""The smallest reward with which a completion counts as solved."""


def step_metrics(
    step: int,
    groups: Sequence[Group],
    update: Update,
    status: Mapping[str, float],
    seconds: Mapping[str, float],
    has_tools: bool = False,
    sources: Sequence[str] = (),
    applies: Applying = ALL,
) -> StepMetrics:
    """All metrics of a step. `grpo.scoring.meanings` describes them.

    groups     all sampled groups
    status     metrics that the trainer adds
    seconds    duration of each phase
    has_tools  whether the model can call tools
    sources    names of the sources of tasks, if there are several
    applies    which rewards score which sources
    """
    lengths = [rollout.trajectory.trained_tokens for group in groups for rollout in group.rollouts]
    values = {
        **status,  # first, so that values which rewards log cannot replace metrics of the same name
        **_reward_metrics(groups, applies),
        **_source_metrics(groups, sources),
        **_length_metrics(groups, lengths),
        **_conversation_metrics(groups, has_tools),
        "skipped_updates": float(update.skipped),
        "updates_without_signal": float(update.without_signal),
        **({"loss": update.loss, "grad_norm": update.grad_norm} if math.isfinite(update.loss) else {}),
        **{name: value for name, value in update.metrics.items() if name not in (TOKENS, FRESH)},
        "num_prompts": float(len(groups)),
        "num_tokens": float(sum(lengths)),
        "rollout_tokens_per_second": sum(lengths) / seconds["rollout"],
        **{f"time/{phase}": spent for phase, spent in seconds.items()},
        "step_time": sum(seconds.values()),
    }
    return StepMetrics(step, values)


def _rewards_of(groups: Sequence[Group]) -> dict[str, float]:
    """The mean reward of groups, and measures of how rewards differ within groups. Empty if no completion has a reward,
    as in a run that learns only from a teacher."""
    rewards_G = [[r.reward for r in group.rollouts if r.reward is not None] for group in groups]
    everything = [reward for rewards in rewards_G for reward in rewards]
    if not everything:
        return {}
    return {
        "reward": fmean(everything),
        "reward_std": fmean(stdev(rewards) if len(rewards) > 1 else 0.0 for rewards in rewards_G),
        "frac_reward_zero_std": fmean(len(set(rewards)) <= 1 for rewards in rewards_G),
        "solved_all": fmean(bool(rewards) and min(rewards) >= SOLVED for rewards in rewards_G),
        "solved_none": fmean(all(reward < SOLVED for reward in rewards) for rewards in rewards_G),
        "mixed": fmean(any(r >= SOLVED for r in rewards) and min(rewards) < SOLVED for rewards in rewards_G),
    }


def _source_metrics(groups: Sequence[Group], sources: Sequence[str]) -> dict[str, float]:
    """Each source's share of the step's tasks, and the rewards and mean length of sources that have tasks."""
    metrics = {}
    for source in sources:
        members = [group for group in groups if group.task.source == source]
        metrics[f"sources/{source}/share"] = len(members) / len(groups)
        if members:
            lengths = [rollout.trajectory.trained_tokens for group in members for rollout in group.rollouts]
            values = {**_rewards_of(members), "mean_length": fmean(lengths)}
            metrics |= {f"sources/{source}/{name}": value for name, value in values.items()}
    return metrics


def _reward_metrics(groups: Sequence[Group], applies: Applying) -> dict[str, float]:
    metrics = _rewards_of(groups)
    conversations = (r.trajectory.conversation for group in groups for r in group.rollouts)
    talked = {conversation.environment for conversation in conversations if conversation is not None}
    for name in groups[0].rollouts[0].scores:
        scored = [group for group in groups if name in talked or applies(name, group.task.source)]
        scores = [rollout.scores[name] for group in scored for rollout in group.rollouts]
        if not scores:  # this reward scores no task of this step
            continue
        known = [score for score in scores if score is not None]
        failures = [r.failures[name].kind for group in scored for r in group.rollouts if name in r.failures]
        if name in talked and not known and not failures:  # tools, or an environment that gives no rewards
            continue
        if known:
            metrics |= {
                f"rewards/{name}/mean": fmean(known),
                f"rewards/{name}/std": stdev(known) if len(known) > 1 else 0.0,
            }
        kinds = FAILURES if talked else ("error", "timeout")  # without conversations, rewards fail only in these ways
        rates = {str(kind): failures.count(kind) / len(scores) for kind in kinds}
        rates["none"] = (len(scores) - len(known) - len(failures)) / len(scores)
        metrics |= {f"rewards/{name}/{kind}_rate": rate for kind, rate in rates.items()}
    return metrics


def _length_metrics(groups: Sequence[Group], lengths: Sequence[int]) -> dict[str, float]:
    trajectories = [rollout.trajectory for group in groups for rollout in group.rollouts]
    reasons = [trajectory.finish_reason for trajectory in trajectories]
    terminated = [length for length, t in zip(lengths, trajectories, strict=True) if not t.truncated] or [0]
    return {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": fmean(terminated),
        "completions/min_terminated_length": float(min(terminated)),
        "completions/max_terminated_length": float(max(terminated)),
        "completions/clipped_ratio": fmean(reason == "length" for reason in reasons),
        "completions/repetition_ratio": fmean(reason == "repetition" for reason in reasons),
    }


def _conversation_metrics(groups: Sequence[Group], has_tools: bool) -> dict[str, float]:
    """Metrics of conversations: turns, how they ended, and with tools TRL's two metrics. Empty for single answers."""
    trajectories = [rollout.trajectory for group in groups for rollout in group.rollouts]
    conversations = [trajectory.conversation for trajectory in trajectories if trajectory.conversation is not None]
    if not conversations:
        return {}
    talks = [trajectory for trajectory in trajectories if trajectory.conversation is not None]
    reasons = [trajectory.finish_reason for trajectory in talks]
    metrics = {"turns/mean": fmean(trajectory.turns for trajectory in talks)}
    metrics |= _agent_metrics(talks)
    metrics |= {f"stop/{reason}": reasons.count(reason) / len(reasons) for reason in get_args(FinishReason)}
    if has_tools:
        calls, failed = (sum(getattr(one, name) for one in conversations) for name in ("calls", "failed_calls"))
        metrics["tools/call_frequency"] = calls / len(trajectories)
        metrics["tools/failure_frequency"] = failed / calls if calls else 0.0
    return metrics


def _agent_metrics(talks: Sequence[Trajectory]) -> dict[str, float]:
    """The values that agents reported about their rollouts, each averaged over the rollouts that reported it."""
    reported: dict[str, list[float]] = {}
    for talk in talks:
        for name, value in measured(talk).items():
            reported.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in reported.items()}
