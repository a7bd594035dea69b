"""Advantages relative to the group (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

import mlx.core as mx

from grpo.config import AdvantageConfig

EPSILON = 1e-4
"""Added to the deviation that centred rewards are divided by, as in TRL."""


def total_rewards(rewards: mx.array, weights: mx.array) -> mx.array:
    """The weighted sum of each completion's rewards.

    rewards `[N, F]` float32 with NaN for "no score"; weights `[F]`. Returns `[N]` float32: the sum over the rewards
    that count (weight not 0) and did score, NaN where none did.
    """
    scored = ~mx.isnan(rewards) & (weights != 0)[None]
    total = mx.where(scored, rewards * weights, 0.0).sum(axis=1)
    return mx.where(scored.any(axis=1), total, mx.nan)


def advantages(rewards: mx.array, weights: mx.array, num_generations: int, cfg: AdvantageConfig) -> mx.array:
    """How much better each completion did than its group.

    rewards `[N, F]` float32 with NaN for "no score", rows of a group of `num_generations` together; weights `[F]`.
    Returns `[N]` float32. With R the total reward, μ and σ its mean and its deviation with Bessel's correction:

        scale_rewards group:  (R - μ_group) / (σ_group + 1e-4)     arXiv 2402.03300
        scale_rewards batch:  (R - μ_group) / (σ_batch + 1e-4)     arXiv 2508.08221
        scale_rewards none:    R - μ_group                         arXiv 2503.20783

    A completion that nothing scored takes no part in μ and σ and gets 0; so does every completion of a group
    whose rewards are all equal, and exactly.
    """
    total = total_rewards(rewards, weights)
    grouped = total.reshape(-1, num_generations)
    scored = ~mx.isnan(grouped)
    values = mx.where(scored, grouped, 0.0)
    centred = mx.where(scored & ~_uniform(values, scored), values - _mean(values, scored), 0.0)
    if cfg.scale_rewards == "group":
        centred = centred / (_deviation(values, scored) + EPSILON)
    elif cfg.scale_rewards == "batch":
        centred = centred / (_deviation(values.reshape(1, -1), scored.reshape(1, -1)) + EPSILON)
    return centred.reshape(-1)


def _uniform(values: mx.array, scored: mx.array) -> mx.array:
    """Rows whose scored values are all equal: there, centring would leave rounding, and scaling blow it up."""
    highest = mx.where(scored, values, -mx.inf).max(axis=1, keepdims=True)
    lowest = mx.where(scored, values, mx.inf).min(axis=1, keepdims=True)
    return highest <= lowest


def _mean(values: mx.array, scored: mx.array) -> mx.array:
    return values.sum(axis=1, keepdims=True) / mx.maximum(scored.sum(axis=1, keepdims=True), 1)


def _deviation(values: mx.array, scored: mx.array) -> mx.array:
    """With Bessel's correction over the scored values of each row; 0 for fewer than two."""
    squares = mx.where(scored, (values - _mean(values, scored)) ** 2, 0.0).sum(axis=1, keepdims=True)
    return mx.sqrt(squares / mx.maximum(scored.sum(axis=1, keepdims=True) - 1, 1))
