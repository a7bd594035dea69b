"""Matrix products whose rows are the same to the bit however many rows there are.

How many tokens go through a product follows from which rows happen to be in the slots and how wide a step is. On a CPU
the BLAS library takes other kernels for fewer than four rows and for matrices with 16 columns, which round otherwise.
Without those, what is decoded depends on neither.
"""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.device import on_gpu

FEWEST = 4
"""Rows from which on a row's product does not depend on how many there are."""
SKINNY = 16
"""Columns of a matrix for which it does."""


def fewest_rows() -> int:
    """How many rows a product needs at least."""
    return 1 if on_gpu() else FEWEST


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """`x [..., M, K] @ matrix [..., K, N]`."""
    if on_gpu():
        return x @ matrix
    rows, columns = x.shape[-2], matrix.shape[-1]
    if columns == SKINNY:
        matrix = mx.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, SKINNY)])
    if rows < FEWEST:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, FEWEST - rows), (0, 0)])
    found = x @ matrix
    return found if found.shape[-2:] == (rows, columns) else found[..., :rows, :columns]
