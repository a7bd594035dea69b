"""What takes tokens out of the distribution before one is drawn. All work on fp32 logits `[S, V]` at temperature."""

from __future__ import annotations

import math

import mlx.core as mx


def repetition_penalised(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Logits of seen tokens (`[S, V]` bool) divided by the penalty, or multiplied where negative (arXiv 1909.05858)."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def threshold(logits: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    """The lowest logit that may still be drawn, `[S, 1]`: -inf where all may.

    top_k (0: all) keeps the k highest; top_p the fewest of those whose share of what is left reaches p; min_p those
    whose probability is at least that share of the highest. Tokens of equal logits stay or go together.
    """
    lowest = mx.full((logits.shape[0], 1), -math.inf)
    if top_k or top_p < 1:
        ordered = mx.sort(logits, axis=-1)[:, ::-1]
        kept = min(top_k or logits.shape[1], logits.shape[1])
        lowest = ordered[:, kept - 1 : kept]
        if top_p < 1:
            # Up to the first token with which the share reaches p, that one included.
            shares = mx.cumsum(mx.softmax(cut(ordered, lowest), axis=-1), axis=-1)
            last = mx.minimum((shares < top_p).sum(axis=-1, keepdims=True), logits.shape[1] - 1)
            lowest = mx.maximum(lowest, mx.take_along_axis(ordered, last, axis=-1))
    if min_p:
        lowest = mx.maximum(lowest, logits.max(axis=-1, keepdims=True) + math.log(min_p))
    return lowest


def cut(logits: mx.array, lowest: mx.array) -> mx.array:
    """Logits below the threshold become -inf."""
    return mx.where(logits >= lowest, logits, -math.inf)
