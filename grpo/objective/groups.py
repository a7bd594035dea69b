"""Advantages for groups of rollouts: the arrays' maths applied to what flows between rooms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from grpo.config import AdvantageConfig, RewardConfig
from grpo.objective.advantages import advantages, total_rewards
from grpo.types import Group


def with_advantages(groups: Sequence[Group], rewards: Sequence[RewardConfig], cfg: AdvantageConfig) -> list[Group]:
    """The same groups with `reward` and `advantage` in their rollouts.

    `rewards` gives the weights, in the order of each rollout's scores. All groups have the same size.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [[math.nan if s is None else s for s in rollout.scores.values()] for rollout in rollouts]
    scores_NF, weights_F = mx.array(scores), mx.array([float(reward.weight) for reward in rewards])
    totals: Any = total_rewards(scores_NF, weights_F).tolist()
    values: Any = advantages(scores_NF, weights_F, len(groups[0].rollouts), cfg).tolist()
    learnt = iter(
        replace(rollout, reward=None if math.isnan(total) else total, advantage=value)
        for rollout, total, value in zip(rollouts, totals, values, strict=True)
    )
    return [replace(group, rollouts=tuple(next(learnt) for _ in group.rollouts)) for group in groups]
