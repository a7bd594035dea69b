"""Importance ratios, of tokens or of whole completions."""

from __future__ import annotations

import mlx.core as mx

from grpo.presets import Ratio

LARGEST = 20.0
"""Log-ratios are cut off here before they are exponentiated: beyond it float32 would overflow to NaN gradients."""


def bounded_exp(values: mx.array) -> mx.array:
    """`exp`, constant (and so without gradient) from e^20 on."""
    return mx.exp(mx.minimum(values, LARGEST))


def mean_over_tokens(values: mx.array, trained: mx.array) -> mx.array:
    """The mean over each row's trained tokens: `[B, T]` in, `[B, 1]` out, 0 for a row without tokens."""
    return (values * trained).sum(axis=1, keepdims=True) / mx.maximum(trained.sum(axis=1, keepdims=True), 1)


def log_ratios(current: mx.array, denominator: mx.array, trained: mx.array, level: Ratio) -> mx.array:
    """Log of the ratio current / denominator that each token's surrogate sees: `[B, T]`, 0 where nothing is trained.

    The denominator is the anchor (the policy before this step's first update), or for dppo what was sampled from.

    `sequence` (GSPO, arXiv 2507.18071, eq. 7) is the same for a row's trained tokens; `sequence_token` (eq. 14) has its
    value and the gradient of the token's own ratio. A conversation that went on in new rows is a sequence in each.
    """
    log_ratio = current - denominator
    if level == "token":
        return log_ratio
    sequence = mx.broadcast_to(mean_over_tokens(log_ratio, trained), trained.shape) * trained
    if level == "sequence":
        return sequence
    return mx.stop_gradient(sequence) + current - mx.stop_gradient(current)
