"""Filters and the repetition penalty, which reshape the distribution before a token is drawn.

All functions take fp32 logits `[S, V]` at the sampling temperature.
"""

from __future__ import annotations

import math

import mlx.core as mx


def repetition_penalised(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Divide the logits of seen tokens (`[S, V]` bool) by the penalty; multiply negative ones (arXiv 1909.05858)."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def threshold(logits: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    """The lowest logit that may be drawn, `[S, 1]`; -inf if all tokens may be drawn.

    top_k (0: off) keeps the k highest logits. Of these, top_p keeps the smallest set of likeliest tokens whose
    probability, renormalized, reaches p. min_p keeps tokens with at least this fraction of the highest probability.
    Tokens with equal logits are kept or removed together.
    """
    lowest = mx.full((logits.shape[0], 1), -math.inf)
    if top_k or top_p < 1:
        ordered = mx.sort(logits, axis=-1)[:, ::-1]
        kept = min(top_k or logits.shape[1], logits.shape[1])
        lowest = ordered[:, kept - 1 : kept]
        if top_p < 1:
            # Keep up to and including the first token with which the sum reaches p.
            shares = mx.cumsum(mx.softmax(cut(ordered, lowest), axis=-1), axis=-1)
            last = mx.minimum((shares < top_p).sum(axis=-1, keepdims=True), logits.shape[1] - 1)
            lowest = mx.maximum(lowest, mx.take_along_axis(ordered, last, axis=-1))
    if min_p:
        lowest = mx.maximum(lowest, logits.max(axis=-1, keepdims=True) + math.log(min_p))
    return lowest


def cut(logits: mx.array, lowest: mx.array) -> mx.array:
    """The logits, with -inf for those below the threshold."""
    return mx.where(logits >= lowest, logits, -math.inf)
