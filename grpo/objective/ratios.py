"""Importance ratios, of tokens or of whole completions."""

from __future__ import annotations

import mlx.core as mx

from grpo.presets import Ratio

LARGEST = 20.0
"""Log-ratios are cut off here before they are exponentiated: beyond it float32 would overflow to NaN gradients."""


def bounded_exp(values: mx.array) -> mx.array:
    """`exp`, constant (and so without gradient) from e^20 on."""
    return mx.exp(mx.minimum(values, LARGEST))


def mean_over_tokens(values: mx.array, mask: mx.array) -> mx.array:
    """The mean over each row's masked tokens: `[B, T]` in, `[B, 1]` out, 0 for a row without tokens."""
    return (values * mask).sum(axis=1, keepdims=True) / mx.maximum(mask.sum(axis=1, keepdims=True), 1)


def log_ratios(logprobs: mx.array, old_logprobs: mx.array, mask: mx.array, level: Ratio) -> mx.array:
    """Log of the ratio that each token's surrogate sees: `[B, T]`, from current and behaviour logprobs, 0 on padding.

    `sequence` (GSPO, arXiv 2507.18071, eq. 7) is the same for a row's tokens; `sequence_token` (eq. 14) has its
    value and the gradient of the token's own ratio.
    """
    log_ratio = logprobs - old_logprobs
    if level == "token":
        return log_ratio
    sequence = mx.broadcast_to(mean_over_tokens(log_ratio, mask), mask.shape) * mask
    if level == "sequence":
        return sequence
    return mx.stop_gradient(sequence) + logprobs - mx.stop_gradient(logprobs)
