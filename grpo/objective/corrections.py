"""Corrections for differences between sampler and trainer: importance weights and the off-policy mask."""

from __future__ import annotations

import mlx.core as mx

from grpo.config import LossConfig
from grpo.objective.ratios import bounded_exp, mean_over_tokens
from grpo.types import Batch


def drawn_from(batch: Batch) -> mx.array | None:
    """Log p under the distribution that tokens were drawn from: `sampler` if filters changed it, else `behaviour`."""
    return batch.behaviour if batch.sampler is None else batch.sampler


def sampled_from(batch: Batch) -> mx.array:
    """The denominator of dppo's ratios, `[B, T]`: what `drawn_from` returns, with the anchor in place of NaN.

    Raises ValueError for a batch that has neither `sampler` nor `behaviour`.
    """
    sampler = drawn_from(batch)
    if sampler is None:
        raise ValueError("dppo needs the column `behaviour` in the batch")
    assert batch.anchor is not None
    return mx.where(batch.trained > 0, mx.where(mx.isnan(sampler), batch.anchor, sampler), 0.0)


def sampling_log_ratios(anchor: mx.array, sampler: mx.array, trained: mx.array) -> tuple[mx.array, mx.array]:
    """The log of the ratio anchor / sampler per token `[B, T]`, and summed over each completion `[B, 1]`.

    Neither is truncated. The trainer computes `anchor`; `sampler` is what `drawn_from` returns. Where a logprob is NaN,
    the ratio is 1. The sum grows with length, so metrics report both.
    """
    difference = anchor - sampler
    token = mx.where((trained > 0) & ~mx.isnan(difference), difference, 0.0)
    return token, token.sum(axis=1, keepdims=True)


def importance_weights(token: mx.array, sequence: mx.array, cfg: LossConfig) -> mx.array:
    """The factor for each token's loss, `[B, T]` without gradient, from the results of `sampling_log_ratios`.

    The `_truncate` forms cut the factor off at `importance_sampling_cap`. The `_mask` forms set it to 0 outside
    [floor, cap] (arXiv 2510.18855).
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
    """`(Σ w)² / (N Σ w²)` over N trained tokens: 1 if all weights are equal, 1/N if only one weight is not 0."""
    kept = weights * trained
    squares = (kept * kept).sum() * mx.maximum(trained.sum(), 1)
    return mx.where(squares > 0, kept.sum() ** 2 / mx.maximum(squares, 1e-30), 1.0)


def off_policy_keep(drift: mx.array, advantages: mx.array, trained: mx.array, threshold: float) -> mx.array:
    """`[B, T]`: 0 for completions with a negative advantage that the policy has moved away from, 1 for all others.

    `drift` is behaviour logprobs - current logprobs. Its mean over a completion's trained tokens estimates how far the
    policy has moved (DeepSeek-V3.2, arXiv 2512.02556).
    """
    drifted = (mean_over_tokens(drift, trained) > threshold) & (advantages < 0)
    return mx.stop_gradient(mx.where(drifted, 0.0, 1.0))
