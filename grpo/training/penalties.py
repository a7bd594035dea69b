"""What is taken off a reward before advantages: length near the limit, and distance from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import mlx.core as mx

from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.objective.kl import kl_estimate
from grpo.objective.masks import soft_overlong_punishment
from grpo.training.batches import batch_logprobs, whole_batches
from grpo.types import Group


def with_penalties(groups: Sequence[Group], policy: Policy, cfg: Recipe, beta: float) -> list[Group]:
    """The same groups with `penalty` in their rollouts; as they are where the recipe asks for none."""
    overlong, kl = cfg.advantage.soft_overlong_cache is not None, cfg.loss.kl_in == "reward" and beta > 0
    if not (overlong or kl):
        return list(groups)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    divergences = _divergences(groups, policy, cfg) if kl else [0.0] * len(rollouts)
    penalised = iter(
        replace(rollout, penalty=beta * divergence - _overlong(len(rollout.completion.token_ids), cfg))
        for rollout, divergence in zip(rollouts, divergences, strict=True)
    )
    return [replace(group, rollouts=tuple(next(penalised) for _ in group.rollouts)) for group in groups]


def penalty_metrics(groups: Sequence[Group], cfg: Recipe) -> dict[str, float]:
    """The mean of what was taken off, where the recipe asks for penalties."""
    if cfg.advantage.soft_overlong_cache is None and cfg.loss.kl_in != "reward":
        return {}
    return {"reward_penalty": fmean(rollout.penalty for group in groups for rollout in group.rollouts)}


def _overlong(length: int, cfg: Recipe) -> float:
    cache = cfg.advantage.soft_overlong_cache
    return 0.0 if cache is None else soft_overlong_punishment(length, cfg.rollout.max_completion_length, cache)


def _divergences(groups: Sequence[Group], policy: Policy, cfg: Recipe) -> list[float]:
    """The KL estimate of each row, summed over its tokens, between the sampler's logprobs and the reference's."""
    found: list[float] = []
    with policy.use("reference"):
        for batch in whole_batches(groups, cfg):
            reference, _ = batch_logprobs(policy, batch)
            estimate = kl_estimate(batch.sampling_logprobs, reference, cfg.loss.kl_estimator)
            sums: Any = mx.where(batch.mask > 0, estimate, 0.0).sum(axis=1).tolist()
            found += sums[: batch.real_rows]
    return found
