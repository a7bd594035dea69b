"""The choice of the tokens to train on, made before the weights are fixed: numerator and denominator share one mask."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np


def top_entropy_mask(entropies: mx.array, mask: mx.array, quantile: float) -> mx.array:
    """The mask reduced to the fraction `quantile` of its tokens with the highest entropy: `[N, T]` (arXiv 2506.01939).

    It keeps ⌈quantile · n⌉ of n valid tokens, and further tokens whose entropy ties with the lowest that is kept.
    """
    threshold = top_entropy_threshold(np.array(entropies)[np.array(mask) > 0], quantile)
    return mx.where((entropies >= threshold) & (mask > 0), mask, 0.0)


def top_entropy_threshold(entropies: np.ndarray, quantile: float) -> float:
    """The lowest entropy that `top_entropy_mask` keeps; -∞ if it keeps all. entropies `[n]` are of the valid tokens."""
    if entropies.size == 0 or quantile >= 1:
        return -math.inf
    count = max(1, math.ceil(quantile * entropies.size - 1e-9))
    return float(np.partition(entropies, -count)[-count])


def soft_overlong_punishment(length: int, longest: int, cache: int) -> float:
    """DAPO's penalty on a completion's length in tokens (arXiv 2503.14476, eq. 13).

    0 up to `longest - cache`, then falling linearly to -1 at `longest`, and -1 beyond.
    """
    free = longest - cache
    if length <= free:
        return 0.0
    return max(-1.0, (free - length) / cache)
