"""The metrics of a step's batches put together as if they had been one batch."""

from __future__ import annotations

from collections.abc import Sequence

TOKENS, FRESH, SAMPLING = "tokens", "fresh_tokens", "sampling/"
"""Metrics under `sampling/` are of the fresh tokens; where no `fresh_tokens` are counted, all tokens are fresh."""
RATIO, SAMPLE_SIZE = "sampling/importance_sampling_ratio/mean", "sampling/effective_sample_size"


def combine_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """One set of metrics from those of several batches, as `policy_loss` gives them, numbers instead of arrays.

    Means are weighted by tokens, `min` and `max` taken, tokens added. What is of fresh tokens alone is left out where
    there are none. No parts give no metrics.
    """
    fresh = [part for part in parts if part.get(FRESH, 1.0) > 0]
    names = dict.fromkeys(name for part in parts for name in part if name != FRESH)
    combined = {}
    for name in names:
        of, count = (fresh, _fresh) if name.startswith(SAMPLING) else (parts, _tokens)
        if of:
            combined[name] = _combine(name, [part[name] for part in of], [count(part) for part in of])
    if any(FRESH in part for part in parts):
        combined[FRESH] = sum(map(_fresh, parts))
    if SAMPLE_SIZE in combined:
        combined[SAMPLE_SIZE] = _sample_size(fresh, [_fresh(part) for part in fresh])
    return combined


def _tokens(part: dict[str, float]) -> float:
    return part[TOKENS]


def _fresh(part: dict[str, float]) -> float:
    return part.get(FRESH, part[TOKENS])


def _combine(name: str, values: Sequence[float], tokens: Sequence[float]) -> float:
    if name == TOKENS:
        return sum(values)
    if name.endswith("min"):
        return min(values)
    if name.endswith("max"):
        return max(values)
    return sum(value * count for value, count in zip(values, tokens, strict=True)) / max(1.0, sum(tokens))


def _sample_size(parts: Sequence[dict[str, float]], tokens: Sequence[float]) -> float:
    """(Σ w)² / (N Σ w²), from each part's mean and own sample size."""
    sums = [part[RATIO] * count for part, count in zip(parts, tokens, strict=True)]
    squares = [
        total**2 / max(part[SAMPLE_SIZE] * count, 1e-30) for total, part, count in zip(sums, parts, tokens, strict=True)
    ]
    return sum(sums) ** 2 / max(sum(tokens) * sum(squares), 1e-30)
