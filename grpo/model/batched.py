"""Batches of token rows, padded on the right, where a causal model's earlier tokens do not see the padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from grpo.backend import cuda

FUSED = 128
"""On CUDA, attention is fused only for multiples of this many tokens. Otherwise it would store the scores of all pairs.
"""


def batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Row indices by batch, longest rows first. A batch has at most `most` tokens, padding included, or one row."""
    made: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if made and padded(lengths[made[-1][0]]) * (len(made[-1]) + 1) <= most:
            made[-1].append(place)
        else:
            made.append([place])
    return made


def padded(length: int) -> int:
    """The padded length of rows of this length."""
    return -(-length // FUSED) * FUSED if cuda.available() else length


def in_batches(
    rows: Sequence[Sequence[int]], most: int, read: Callable[[mx.array, Sequence[Sequence[int]]], Sequence[float]]
) -> list[float]:
    """One number per row, computed by `read` for batches of tokens `[B, L]` and their rows. Keeps the order of rows.

    A batch has at most `most` tokens, padding included, or else one row. No row may be empty.
    """
    found = [0.0] * len(rows)
    for places in batches([len(row) for row in rows], most):
        together = [rows[place] for place in places]
        width = padded(max(map(len, together)))
        tokens = mx.array([[*row, *[0] * (width - len(row))] for row in together])
        for place, value in zip(places, read(tokens, together), strict=True):
            found[place] = value
    return found
