"""What is taken off a reward before advantages: length near the limit, and distance from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from grpo.backend.ranks import Ranks
from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.objective.masks import soft_overlong_punishment
from grpo.training.gauges import divergences, mean_kl
from grpo.types import Group, Totals


def with_penalties(
    groups: Sequence[Group], totals: Totals, policy: Policy, cfg: Recipe, beta: float, ranks: Ranks
) -> tuple[list[Group], dict[str, float]]:
    """The same groups with `penalty` in their rollouts, and its metrics; as they are where the recipe asks for none.

    The metrics are the mean penalty, and the KL that it was made of.
    """
    in_reward = cfg.loss.kl_in == "reward"
    if not in_reward and cfg.advantage.soft_overlong_cache is None:
        return list(groups), {}
    lengths = [rollout.trajectory.trained_tokens for group in groups for rollout in group.rollouts]
    penalties, metrics = [-_overlong(length, cfg) for length in lengths], {}
    if in_reward and beta > 0:
        found = divergences(groups, policy, cfg, ranks)
        penalties = [penalty + beta * divergence for penalty, divergence in zip(penalties, found, strict=True)]
        metrics["kl"] = mean_kl(found, totals)
    each = iter(penalties)
    penalised = [
        replace(group, rollouts=tuple(replace(rollout, penalty=next(each)) for rollout in group.rollouts))
        for group in groups
    ]
    return penalised, {"reward_penalty": fmean(penalties), **metrics}


def _overlong(length: int, cfg: Recipe) -> float:
    cache = cfg.advantage.soft_overlong_cache
    return 0.0 if cache is None else soft_overlong_punishment(length, cfg.rollout.max_completion_length, cache)
