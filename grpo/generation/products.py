"""Matrix products whose rows are the same to the bit however many rows there are.

How many tokens go through a product follows from which rows happen to be in the slots and how wide a step is. On a CPU
MKL takes other kernels for fewer than four rows, and for fewer than 24 columns, which round otherwise. Without those,
what is decoded depends on neither. With fewer than four rows, on the other hand, a sum does not depend on the zeros
behind it, which more rows are told apart by: they add up in blocks of the whole length.
"""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.device import on_gpu

FEWEST_ROWS = 4
FEWEST_COLUMNS = 24


def fewest_rows() -> int:
    """How many rows a product needs at least."""
    return 1 if on_gpu() else FEWEST_ROWS


def fewest_columns() -> int:
    """How many columns a matrix needs at least."""
    return 1 if on_gpu() else FEWEST_COLUMNS


def few_rows(rows: int) -> int:
    """How many rows to take at a time where products are added up over a length that varies; it divides `rows`."""
    return rows if on_gpu() else next(few for few in (3, 2, 1) if rows % few == 0)


def padded(array: mx.array, least: int, axis: int) -> mx.array:
    """An array with zeros behind it where it is shorter than `least`."""
    missing = least - array.shape[axis]
    if missing <= 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return mx.pad(array, widths)


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """`x [..., M, K] @ matrix [..., K, N]`."""
    rows, columns = x.shape[-2], matrix.shape[-1]
    found = padded(x, fewest_rows(), -2) @ padded(matrix, fewest_columns(), -1)
    return found if found.shape[-2:] == (rows, columns) else found[..., :rows, :columns]
