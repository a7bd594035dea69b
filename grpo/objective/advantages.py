"""Advantages: how much better a completion did than its baseline."""

from __future__ import annotations

import mlx.core as mx

from grpo.config import AdvantageConfig
from grpo.presets import PRESETS, Preset, Scale

EPSILON = 1e-4
"""Added to the standard deviation before a division by it, as in TRL."""


def total_rewards(rewards: mx.array, weights: mx.array) -> mx.array:
    """The weighted sum of each completion's rewards.

    rewards `[N, F]` float32 with NaN for "no score"; weights `[F]`. Returns `[N]` float32: the sum over the scores
    whose weight is not 0, or NaN for a completion without such a score.
    """
    scored = ~mx.isnan(rewards) & (weights != 0)[None]
    total = mx.where(scored, rewards * weights, 0.0).sum(axis=1)
    return mx.where(scored.any(axis=1), total, mx.nan)


def advantages(
    rewards: mx.array,
    weights: mx.array,
    num_generations: int,
    cfg: AdvantageConfig,
    preset: Preset = PRESETS["grpo"],
) -> mx.array:
    """The advantage of each completion.

    rewards `[N, F]` float32 with NaN for "no score", the `num_generations` rows of a group adjacent; weights `[F]`.
    `preset` gives baseline and scaling unless `cfg` sets them. Returns `[N]` float32. R is the total reward, μ its mean
    and σ its standard deviation with Bessel's correction, both over the group unless stated; n is the group's size:

        group          R - μ, divided by  σ + 1e-4              scale_rewards group   arXiv 2402.03300
                                          σ of the batch + 1e-4 scale_rewards batch   arXiv 2508.08221
                                          nothing               scale_rewards none    arXiv 2503.20783
        leave_one_out  R - mean of the others = n/(n - 1) (R - μ), scaled as above    arXiv 2402.14740
        batch          (R - μ of the batch) / (σ of the batch + 1e-4)                 arXiv 2501.03262
        gdpo           Σ weight · (R_f - μ_f) / (σ_f + 1e-4) over rewards f, whitened as in batch      arXiv 2601.05242
        maxrl          (R - μ) / μ, for nonnegative rewards; 0 where μ is not positive

    A completion without a score is left out of all means and gets 0. If all rewards of a group are equal, all its
    advantages are exactly 0, except with `batch`, which compares across groups, and `gdpo`, where the whitening leaves
    a rounding error.
    """
    weights = mx.array(weights)
    if rewards.shape[0] % num_generations:
        raise ValueError(f"{rewards.shape[0]} completions cannot be split into groups of {num_generations}")
    scale = cfg.scale_rewards or preset.scale_rewards
    total = total_rewards(rewards, weights)
    grouped = total.reshape(-1, num_generations)
    scored = ~mx.isnan(grouped)
    match cfg.baseline or preset.baseline:
        case "group":
            found = _scaled(_centred(grouped), grouped, scale)
        case "leave_one_out":
            count = scored.sum(axis=1, keepdims=True)
            found = _scaled(_centred(grouped) * count / mx.maximum(count - 1, 1), grouped, scale)
        case "batch":
            found = _whitened(grouped)
        case "gdpo":
            found = _gdpo(rewards, weights, num_generations)
        case "maxrl":
            mean = _mean(grouped)
            found = mx.where(mean > 0, _centred(grouped) / mx.where(mean > 0, mean, 1.0), 0.0)
    return found.reshape(-1)


def turn_advantages(rewards: mx.array, cfg: AdvantageConfig, preset: Preset = PRESETS["grpo"]) -> mx.array:
    """The advantage of each turn: process supervision (DeepSeekMath, arXiv 2402.03300, §4.1.3), with turns as steps.

    rewards `[G, n, T]` float32: up to T turn rewards for each of n completions in G groups; NaN for a turn without a
    reward, and for padding. Returns `[G, n, T]` float32. μ and σ are the mean of all turn rewards of a group and their
    standard deviation with Bessel's correction; r_it is the reward of turn t of completion i:

        A_it = Σ_{t' ≥ t} (r_it' - μ) / (σ + 1e-4)

    With `scale_rewards: batch`, σ is the standard deviation over all turns of the batch; with `none`, there is no
    division. A turn without a reward is left out of μ and σ and adds nothing to the sums. If all rewards of a group
    are equal, all its advantages are exactly 0. With one turn per completion, this function returns the same as
    `advantages` with the `group` baseline.
    """
    grouped = rewards.reshape(rewards.shape[0], -1)
    found = _scaled(_centred(grouped), grouped, cfg.scale_rewards or preset.scale_rewards).reshape(rewards.shape)
    return mx.cumsum(found, axis=2, reverse=True)


def _gdpo(rewards: mx.array, weights: mx.array, size: int) -> mx.array:
    """Normalize each reward within its group, so that no reward drowns out another; then sum and whiten."""
    if not (weights != 0).any().item():
        return mx.zeros(rewards.shape[0])
    columns = [rewards[:, f].reshape(-1, size) for f in range(rewards.shape[1]) if weights[f].item() != 0]
    used = [weights[f] for f in range(rewards.shape[1]) if weights[f].item() != 0]
    normalised = [_centred(column) / (_deviation(column) + EPSILON) for column in columns]
    scored = mx.stack([~mx.isnan(column) for column in columns]).any(axis=0)
    total = mx.stack([w * n for w, n in zip(used, normalised, strict=True)]).sum(axis=0)
    return _whitened(mx.where(scored, total, mx.nan))


def _scaled(centred: mx.array, grouped: mx.array, scale: Scale) -> mx.array:
    match scale:
        case "group":
            return centred / (_deviation(grouped) + EPSILON)
        case "batch":
            return centred / (_deviation(grouped.reshape(1, -1)) + EPSILON)
        case "none":
            return centred


def _whitened(values: mx.array) -> mx.array:
    """The values, centered and scaled over the batch."""
    flat = values.reshape(1, -1)
    return (_centred(flat) / (_deviation(flat) + EPSILON)).reshape(values.shape)


# The functions below take `[rows, n]` with NaN for "no score", and use only the scored values of each row.


def _centred(values: mx.array) -> mx.array:
    """Values minus their row's mean; exactly 0 in a row of equal values, where rounding would leave a remainder."""
    scored = ~mx.isnan(values)
    highest = mx.where(scored, values, -mx.inf).max(axis=1, keepdims=True)
    lowest = mx.where(scored, values, mx.inf).min(axis=1, keepdims=True)
    return mx.where(scored & (highest > lowest), mx.where(scored, values, 0.0) - _mean(values), 0.0)


def _mean(values: mx.array) -> mx.array:
    scored = ~mx.isnan(values)
    return mx.where(scored, values, 0.0).sum(axis=1, keepdims=True) / mx.maximum(scored.sum(axis=1, keepdims=True), 1)


def _deviation(values: mx.array) -> mx.array:
    """The standard deviation of each row, with Bessel's correction; 0 for fewer than two values."""
    scored = ~mx.isnan(values)
    squares = mx.where(scored, mx.where(scored, values, 0.0) - _mean(values), 0.0) ** 2
    return mx.sqrt(squares.sum(axis=1, keepdims=True) / mx.maximum(scored.sum(axis=1, keepdims=True) - 1, 1))
