"""The completion's length in tokens: close to a target, short (cosine), or a penalty near the limit."""

import math
from collections.abc import Callable
from typing import Any, Literal


def reward(
    tokens: int, kind: Literal["target", "cosine", "overlong"] = "target", cache: int = 0
) -> Callable[..., list[float]]:
    """A score by the number of sampled tokens, the stop token included; `kind` selects the function.

    target: 1 at `tokens`, falling to 0 at length 0 and at 2 × `tokens` (after L1, arXiv 2503.04697). cosine: from 1 at
    length 0 along half a cosine to 0 at `tokens` and beyond (arXiv 2502.03373). overlong: 0 up to `tokens - cache`,
    then falling to -1 at `tokens` (DAPO's soft overlong punishment, arXiv 2503.14476).
    """
    if tokens <= 0:
        raise ValueError(f"kwargs.tokens: expected a number above 0, got {tokens}")
    if (kind == "overlong") != (0 < cache <= tokens):
        raise ValueError("kwargs.cache: kind: overlong needs a cache from 1 to `tokens`; other kinds must not have one")

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [_score(len(ids), tokens, kind, cache) for ids in completion_ids]

    return score


def _score(length: int, tokens: int, kind: str, cache: int) -> float:
    match kind:
        case "target":
            return max(0.0, 1 - abs(length - tokens) / tokens)
        case "cosine":
            return (1 + math.cos(math.pi * min(1.0, length / tokens))) / 2
        case _:
            return -min(1.0, max(0.0, (length - (tokens - cache)) / cache))


CASES = [
    {"completion_ids": [1] * 8, "kwargs": {"tokens": 8}, "score": 1.0},
    {"completion_ids": [1] * 6, "kwargs": {"tokens": 8}, "score": 0.75},
    {"completion_ids": [1] * 20, "kwargs": {"tokens": 8}, "score": 0.0},
    {"completion_ids": [], "kwargs": {"tokens": 8, "kind": "cosine"}, "score": 1.0},
    {"completion_ids": [1] * 4, "kwargs": {"tokens": 8, "kind": "cosine"}, "score": 0.5},
    {"completion_ids": [1] * 16, "kwargs": {"tokens": 8, "kind": "cosine"}, "score": 0.0},
    {"completion_ids": [1] * 80, "kwargs": {"tokens": 100, "kind": "overlong", "cache": 20}, "score": 0.0},
    {"completion_ids": [1] * 90, "kwargs": {"tokens": 100, "kind": "overlong", "cache": 20}, "score": -0.5},
    {"completion_ids": [1] * 101, "kwargs": {"tokens": 100, "kind": "overlong", "cache": 20}, "score": -1.0},
]
