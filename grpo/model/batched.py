"""Rows of token ids that go through a model together, padded on the right, where a causal model does not look."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from grpo.backend import cuda

FUSED = 128
"""On CUDA attention is fused for multiples of so many tokens alone: elsewhere it would hold the scores of all pairs."""


def batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """The places of rows that go through together, the longest first: at most `most` tokens with padding, or a row."""
    made: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if made and padded(lengths[made[-1][0]]) * (len(made[-1]) + 1) <= most:
            made[-1].append(place)
        else:
            made.append([place])
    return made


def padded(length: int) -> int:
    """The length to which rows of this length are padded."""
    return -(-length // FUSED) * FUSED if cuda.available() else length


def in_batches(
    rows: Sequence[Sequence[int]], most: int, read: Callable[[mx.array, Sequence[Sequence[int]]], Sequence[float]]
) -> list[float]:
    """What `read` makes of each row, in their order. It is given tokens `[B, L]` and the rows that they are of.

    At most `most` tokens go through at once, padding included, or else one row. No row is empty.
    """
    found = [0.0] * len(rows)
    for places in batches([len(row) for row in rows], most):
        together = [rows[place] for place in places]
        width = padded(max(map(len, together)))
        tokens = mx.array([[*row, *[0] * (width - len(row))] for row in together])
        for place, value in zip(places, read(tokens, together), strict=True):
            found[place] = value
    return found
