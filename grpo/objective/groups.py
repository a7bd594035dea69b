"""Rewards and advantages for groups of rollouts: the arrays' maths applied to what flows between rooms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from grpo.config import AdvantageConfig, RewardConfig
from grpo.objective.advantages import advantages, total_rewards
from grpo.presets import Preset
from grpo.types import Group, Rollout


def with_rewards(groups: Sequence[Group], rewards: Sequence[RewardConfig]) -> list[Group]:
    """The same groups with `reward` in their rollouts; `rewards` gives the weights, in the order of the scores."""
    scores_NF, weights_F = _scores(groups), _weights(rewards)
    totals: Any = total_rewards(scores_NF, weights_F).tolist()
    return _changed(groups, (replace(r, reward=None if math.isnan(t) else t) for r, t in _zipped(groups, totals)))


def with_advantages(
    groups: Sequence[Group], rewards: Sequence[RewardConfig], cfg: AdvantageConfig, preset: Preset
) -> list[Group]:
    """The same groups with `advantage` in their rollouts. All groups have the same size.

    `rewards` gives the weights, in the order of the scores; `preset` is the loss's, for what `cfg` leaves open.
    Penalties count as one more reward, of weight -1, for the completions that some reward scored.
    """
    scores_NF, weights_F = _scores(groups), _weights(rewards)
    penalties = [r.penalty for group in groups for r in group.rollouts]
    if any(penalties):
        scored = ~mx.isnan(total_rewards(scores_NF, weights_F))
        scores_NF = mx.concatenate([scores_NF, mx.where(scored, mx.array(penalties), mx.nan)[:, None]], axis=1)
        weights_F = mx.concatenate([weights_F, mx.array([-1.0])])
    values: Any = advantages(scores_NF, weights_F, len(groups[0].rollouts), cfg, preset).tolist()
    return _changed(groups, (replace(r, advantage=value) for r, value in _zipped(groups, values)))


def has_variance(group: Group) -> bool:
    """Whether the group's rewards differ, so that it teaches something."""
    return len({rollout.reward for rollout in group.rollouts if rollout.reward is not None}) > 1


def _scores(groups: Sequence[Group]) -> mx.array:
    """`[N, F]`, NaN for no score. Where a function failed, no score counts: the sum would not be the others'."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return mx.array([[math.nan if s is None or r.failed else s for s in r.scores.values()] for r in rollouts])


def _weights(rewards: Sequence[RewardConfig]) -> mx.array:
    return mx.array([float(reward.weight) for reward in rewards])


def _zipped(groups: Sequence[Group], values: Sequence[float]) -> Iterator[tuple[Rollout, float]]:
    return zip((rollout for group in groups for rollout in group.rollouts), values, strict=True)


def _changed(groups: Sequence[Group], rollouts: Iterator[Rollout]) -> list[Group]:
    return [replace(group, rollouts=tuple(next(rollouts) for _ in group.rollouts)) for group in groups]
