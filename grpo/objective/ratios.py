"""Importance ratios of tokens or of whole completions."""

from __future__ import annotations

import mlx.core as mx

from grpo.presets import Ratio

LARGEST = 20.0
"""Log-ratios are capped at this value before the exponential: float32 would overflow and give NaN gradients."""


def bounded_exp(values: mx.array) -> mx.array:
    """`exp(values)`, capped at e^20, where it is constant and so has no gradient."""
    return mx.exp(mx.minimum(values, LARGEST))


def mean_over_tokens(values: mx.array, trained: mx.array) -> mx.array:
    """The mean over each row's trained tokens: `[B, T]` in, `[B, 1]` out, 0 for a row without tokens."""
    return (values * trained).sum(axis=1, keepdims=True) / mx.maximum(trained.sum(axis=1, keepdims=True), 1)


def log_ratios(current: mx.array, denominator: mx.array, trained: mx.array, level: Ratio) -> mx.array:
    """Log of the ratio current / denominator that each token's surrogate uses: `[B, T]`, 0 at untrained tokens.

    The denominator is the anchor (the policy before this step's first update), or for dppo the sampling distribution.

    `sequence` (GSPO, arXiv 2507.18071, eq. 7) is the same for all trained tokens of a row. `sequence_token` (eq. 14)
    has the value of `sequence` and the gradient of the token's own ratio. A conversation that continues in new rows is
    one sequence in each row.
    """
    log_ratio = current - denominator
    if level == "token":
        return log_ratio
    sequence = mx.broadcast_to(mean_over_tokens(log_ratio, trained), trained.shape) * trained
    if level == "sequence":
        return sequence
    return mx.stop_gradient(sequence) + current - mx.stop_gradient(current)
