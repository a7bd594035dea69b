"""Lengths of completions: all equal, or drawn from a distribution that is truncated at the limit."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

from grpo.backend.random import derive_seed
from grpo.errors import UserError

FIXED = "fixed"
SPREAD = 1.0
"""Standard deviation of the logarithm of a log-normal length."""

DISTRIBUTIONS: Mapping[str, Callable[[random.Random, float], float]] = {
    "exponential": lambda draw, mean: draw.expovariate(1 / mean),
    "log-normal": lambda draw, mean: draw.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD),
}
"""Functions that draw one length in tokens with a given mean, before truncation at the limit."""


def draw_lengths(lengths: str, count: int, limit: int) -> list[int]:
    """`count` lengths in tokens, from 1 to `limit`, the same at every call.

    `lengths` is "fixed" (each is `limit`), "exponential:MEAN" or "log-normal:MEAN". Raises UserError for other values.
    """
    if lengths == FIXED:
        return [limit] * count
    kind, _, mean = lengths.partition(":")
    if kind not in DISTRIBUTIONS or not _is_positive(mean):
        known = ", ".join([FIXED, *(f"{name}:MEAN" for name in DISTRIBUTIONS)])
        raise UserError(f"--lengths {lengths}: expected {known}, with a mean above 0 in tokens")
    draw = random.Random(derive_seed(0, "lengths"))
    return [max(1, min(limit, math.ceil(DISTRIBUTIONS[kind](draw, float(mean))))) for _ in range(count)]


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
