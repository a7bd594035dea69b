"""Corrections for differences between sampler and trainer: importance weights, and the off-policy mask."""

from __future__ import annotations

import mlx.core as mx

from grpo.config import LossConfig
from grpo.objective.ratios import bounded_exp, mean_over_tokens
from grpo.types import Batch


def drawn_from(batch: Batch) -> mx.array | None:
    """Log p of the distribution that was drawn from: `sampler` if filters changed it, else `behaviour`."""
    return batch.behaviour if batch.sampler is None else batch.sampler


def sampled_from(batch: Batch) -> mx.array:
    """The denominator of dppo's ratios, `[B, T]`: `drawn_from`, or the anchor where that is NaN.

    Raises ValueError for a batch without either column.
    """
    sampler = drawn_from(batch)
    if sampler is None:
        raise ValueError("dppo needs the column `behaviour` in the batch")
    assert batch.anchor is not None
    return mx.where(batch.trained > 0, mx.where(mx.isnan(sampler), batch.anchor, sampler), 0.0)


def sampling_log_ratios(anchor: mx.array, sampler: mx.array, trained: mx.array) -> tuple[mx.array, mx.array]:
    """The log of the ratio anchor / sampler: of each token `[B, T]`, and summed over each completion `[B, 1]`.

    Both are not truncated. `anchor` is computed by the trainer, `sampler` is what `drawn_from` returns. A NaN logprob
    counts as equal (weight 1). The sum grows with length, so metrics report both.
    """
    difference = anchor - sampler
    token = mx.where((trained > 0) & ~mx.isnan(difference), difference, 0.0)
    return token, token.sum(axis=1, keepdims=True)


def importance_weights(token: mx.array, sequence: mx.array, cfg: LossConfig) -> mx.array:
    """The factor of each token's loss, `[B, T]` without gradient, from `sampling_log_ratios`.

    Truncated at `importance_sampling_cap`, or 0 outside [floor, cap] for the `_mask` forms (arXiv 2510.18855).
    """
    level, _, form = cfg.importance_sampling_correction.partition("_")
    weight = bounded_exp(token if level == "token" else mx.broadcast_to(sequence, token.shape))
    if form == "truncate":
        weight = mx.minimum(weight, cfg.importance_sampling_cap)
    else:
        inside = (weight >= cfg.importance_sampling_floor) & (weight <= cfg.importance_sampling_cap)
        weight = mx.where(inside, weight, 0.0)
    return mx.stop_gradient(weight)


def effective_sample_size(weights: mx.array, trained: mx.array) -> mx.array:
    """`(Σ w)² / (N Σ w²)` over trained tokens: 1 when all weights are equal, 1/N when one has everything."""
    kept = weights * trained
    squares = (kept * kept).sum() * mx.maximum(trained.sum(), 1)
    return mx.where(squares > 0, kept.sum() ** 2 / mx.maximum(squares, 1e-30), 1.0)


def off_policy_keep(drift: mx.array, advantages: mx.array, trained: mx.array, threshold: float) -> mx.array:
    """`[B, T]`: 0 for completions with advantage below 0 that the policy has moved away from, 1 for all others.

    `drift` is behaviour - current logprobs. Its mean over a completion's trained tokens estimates how far the policy
    has moved (DeepSeek-V3.2, arXiv 2512.02556).
    """
    left = (mean_over_tokens(drift, trained) > threshold) & (advantages < 0)
    return mx.stop_gradient(mx.where(left, 0.0, 1.0))
