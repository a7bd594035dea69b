"""Which tokens teach, decided before the weights are fixed: numerator and denominator share one mask."""

from __future__ import annotations

import math

import mlx.core as mx


def top_entropy_mask(entropies: mx.array, mask: mx.array, quantile: float) -> mx.array:
    """The mask cut down to the `quantile` of its tokens with the highest entropy: `[N, T]` (arXiv 2506.01939).

    Of n valid tokens it keeps ⌈quantile · n⌉, and more where entropies tie with the last of these.
    """
    valid = int(mask.sum().astype(mx.int32))
    if valid == 0 or quantile >= 1:
        return mask
    count = max(1, math.ceil(quantile * valid - 1e-9))
    ranked = mx.sort(mx.where(mask > 0, entropies, -mx.inf).reshape(-1))
    threshold = ranked[ranked.size - count]
    return mx.where((entropies >= threshold) & (mask > 0), mask, 0.0)


def soft_overlong_punishment(length: int, longest: int, cache: int) -> float:
    """DAPO's penalty on a completion's length in tokens (arXiv 2503.14476, eq. 13).

    0 up to `longest - cache`, then down on a line to -1 at `longest`, and -1 beyond.
    """
    free = longest - cache
    if length <= free:
        return 0.0
    return max(-1.0, (free - length) / cache)
