"""Matrix products whose rows are the same to the bit, whatever the number of rows.

The number of tokens in a product depends on which rows are in the slots and on the width of a step. On a CPU, MKL uses
other kernels, with other rounding, for fewer than four rows and for fewer than 24 columns. Padding to these sizes makes
the decoded tokens independent of slots and width. Sums over a padded length are the opposite case: with fewer than four
rows they do not depend on the zeros at the end; with more rows they do, because MKL sums in blocks of the whole length.
"""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.device import on_gpu

FEWEST_ROWS = 4
FEWEST_COLUMNS = 24


def fewest_rows() -> int:
    """The minimum number of rows of a product on this device."""
    return 1 if on_gpu() else FEWEST_ROWS


def fewest_columns() -> int:
    """The minimum number of columns of a matrix on this device."""
    return 1 if on_gpu() else FEWEST_COLUMNS


def few_rows(rows: int) -> int:
    """The number of rows per product for sums over a length that varies; it divides `rows`."""
    return rows if on_gpu() else next(few for few in (3, 2, 1) if rows % few == 0)


def padded(array: mx.array, least: int, axis: int) -> mx.array:
    """The array, padded with zeros at the end of `axis` if it is shorter than `least`."""
    missing = least - array.shape[axis]
    if missing <= 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return mx.pad(array, widths)


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """`x [..., M, K] @ matrix [..., K, N]`, padded to the minimum sizes: `[..., M, N]`."""
    rows, columns = x.shape[-2], matrix.shape[-1]
    found = padded(x, fewest_rows(), -2) @ padded(matrix, fewest_columns(), -1)
    return found if found.shape[-2:] == (rows, columns) else found[..., :rows, :columns]
