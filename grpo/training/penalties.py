"""What is taken off a reward before advantages: length near the limit, and distance from the reference."""

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
    """The same groups with `penalty` in their rollouts, and its metrics; as they are where nothing asks for one.

    `cache` is `advantage.soft_overlong_cache`, in tokens before the `longest` that a completion can be; `beta` is the
    weight of the KL that `loss.kl_in: reward` takes off. The metrics are the mean penalty, and the KL that it was made
    of. No pass of `passes.py`: it sees groups, before there are batches.
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
    return penalised, {"reward_penalty": fmean(penalties), **metrics}
