"""Penalties that are subtracted from rewards before advantages: for length, and for KL to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from grpo.objective.masks import soft_overlong_punishment
from grpo.training.gauges import Gauges, mean_kl
from grpo.types import Group, Totals


def with_penalties(
    groups: Sequence[Group], totals: Totals, beta: float, cache: int | None, longest: int, gauges: Gauges
) -> tuple[list[Group], dict[str, float]]:
    """The groups with `penalty` set in their rollouts, and its metrics; unchanged if no penalty is configured.

    `cache` is `advantage.soft_overlong_cache`: the length penalty begins this many tokens before `longest`, the limit
    on a completion. `beta` is the weight of the KL with `loss.kl_in: reward`. The metrics are the mean penalty of
    completions that are not replayed, and the mean KL. This is not one of the passes in `passes.py`, because it needs
    groups, and passes get batches.
    """
    in_reward = gauges.loss.kl_in == "reward"
    if not in_reward and cache is None:
        return list(groups), {}
    lengths = [rollout.trajectory.trained_tokens for group in groups for rollout in group.rollouts]
    penalties = [0.0 if cache is None else -soft_overlong_punishment(length, longest, cache) for length in lengths]
    metrics: dict[str, float] = {}
    if in_reward and beta > 0:
        found = gauges.divergences(groups)
        penalties = [penalty + beta * divergence for penalty, divergence in zip(penalties, found, strict=True)]
        metrics["kl"] = mean_kl(found, totals)
    each = iter(penalties)
    penalised = [
        replace(group, rollouts=tuple(replace(rollout, penalty=next(each)) for rollout in group.rollouts))
        for group in groups
    ]
    fresh = [rollout.penalty for group in penalised for rollout in group.rollouts if not rollout.replayed]
    return penalised, {"reward_penalty": fmean(fresh), **metrics} if fresh else metrics
