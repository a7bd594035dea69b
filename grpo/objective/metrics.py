"""Combines the metrics of a step's batches as if they had been one batch."""

from __future__ import annotations

from collections.abc import Sequence

TOKENS, FRESH, SAMPLING = "tokens", "fresh_tokens", "sampling/"
"""Metrics under `sampling/` cover the fresh tokens only. Without the metric `fresh_tokens`, all tokens are fresh."""
RATIO, SAMPLE_SIZE = "sampling/importance_sampling_ratio/mean", "sampling/effective_sample_size"


def combine_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """One set of metrics from the metrics of several batches: what `policy_loss` returns, with numbers for arrays.

    Token counts are added; names that end in `min` or `max` become the minimum or maximum; all others are means
    weighted by tokens. If there are no fresh tokens, their metrics are left out. Without parts, there are no metrics.
    """
    fresh = [part for part in parts if part.get(FRESH, 1.0) > 0]
    names = dict.fromkeys(name for part in parts for name in part if name != FRESH)
    combined = {}
    for name in names:
        measured, count = (fresh, _fresh) if name.startswith(SAMPLING) else (parts, _tokens)
        if measured:
            combined[name] = _combine(name, [part[name] for part in measured], [count(part) for part in measured])
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
    """(Σ w)² / (N Σ w²), from the mean weight and the sample size of each part."""
    sums = [part[RATIO] * count for part, count in zip(parts, tokens, strict=True)]
    squares = [
        total**2 / max(part[SAMPLE_SIZE] * count, 1e-30) for total, part, count in zip(sums, parts, tokens, strict=True)
    ]
    return sum(sums) ** 2 / max(sum(tokens) * sum(squares), 1e-30)
