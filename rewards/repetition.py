"""A penalty for repetition: the fraction of token n-grams that occurred earlier (arXiv 2502.03373)."""

from collections.abc import Callable
from typing import Any


def reward(n: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """`max_penalty` times the fraction of n-grams that repeat an earlier n-gram; 0 without repetition."""
    if n < 1 or max_penalty > 0:
        raise ValueError("kwargs: n must be at least 1, and max_penalty at most 0")

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [_penalty(ids, n, max_penalty) for ids in completion_ids]

    return score


def _penalty(ids: list[int], n: int, max_penalty: float) -> float:
    count = len(ids) - n + 1
    if count < 1:
        return 0.0
    distinct = {tuple(ids[i : i + n]) for i in range(count)}
    return max_penalty * (1 - len(distinct) / count)


CASES = [
    {"completion_ids": [1, 2, 3, 4, 5], "score": 0.0},
    {"completion_ids": [5, 5, 5, 5, 5], "kwargs": {"n": 2}, "score": -0.75},
    {"completion_ids": [5, 5, 5, 5, 5], "kwargs": {"n": 2, "max_penalty": -0.5}, "score": -0.375},
    {"completion_ids": [1, 2, 1, 2], "kwargs": {"n": 1}, "score": -0.5},
    {"completion_ids": [1, 1], "score": 0.0},
    {"completion_ids": [], "score": 0.0},
]
