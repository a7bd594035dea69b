"""Corrections for the sampler not being the trainer: weights for tokens, and completions left out."""

from __future__ import annotations

import mlx.core as mx

from grpo.config import LossConfig
from grpo.objective.ratios import bounded_exp, mean_over_tokens
from grpo.types import Batch


def drawn_from(batch: Batch) -> mx.array | None:
    """Log p of the distribution that was sampled: `sampler`, with filters another one than the policy's `behaviour`."""
    return batch.behaviour if batch.sampler is None else batch.sampler


def sampled_from(batch: Batch) -> mx.array:
    """The same, and the anchor's where it is NaN: what dppo's ratios are to, `[B, T]`. Raises ValueError without it."""
    sampler = drawn_from(batch)
    if sampler is None:
        raise ValueError("dppo needs the column `behaviour` in the batch")
    assert batch.anchor is not None
    return mx.where(batch.trained > 0, mx.where(mx.isnan(sampler), batch.anchor, sampler), 0.0)


def sampling_log_ratios(anchor: mx.array, sampler: mx.array, trained: mx.array) -> tuple[mx.array, mx.array]:
    """Log of anchor / sampler probability, raw: of each token `[B, T]`, and of each completion as a sum `[B, 1]`.

    The anchor is the policy before this step's first update by the trainer's own word, `sampler` what `drawn_from` has.

    A logprob that is NaN counts as equal (weight 1). The sum grows with length; that is why both are logged.
    """
    difference = anchor - sampler
    token = mx.where((trained > 0) & ~mx.isnan(difference), difference, 0.0)
    return token, token.sum(axis=1, keepdims=True)


def importance_weights(token: mx.array, sequence: mx.array, cfg: LossConfig) -> mx.array:
    """What each token's loss is multiplied by, `[B, T]` without gradient, from `sampling_log_ratios`.

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
    """1 for the completions to keep, 0 for those with advantage below 0 that the policy has left behind: `[B, T]`.

    `drift` is behaviour - current logprobs; a completion's mean of it over its trained tokens estimates how far the
    policy has moved from it (DeepSeek-V3.2, arXiv 2512.02556).
    """
    left = (mean_over_tokens(drift, trained) > threshold) & (advantages < 0)
    return mx.stop_gradient(mx.where(left, 0.0, 1.0))
