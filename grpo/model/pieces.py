"""Computes a row-wise function for a few rows at a time.

Memory then grows with the piece and not with the number of rows: the backward pass recomputes a piece's intermediate
arrays, and each piece waits for the one before it, because MLX would compute independent pieces in parallel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

OfRows = Callable[[int, mx.array], tuple[mx.array, ...]]
"""Takes the number of the first row, and rows `[n, ...]`. Returns arrays `[n, ...]`."""


def in_pieces(function: OfRows, rows: mx.array, size: int, module: nn.Module, parameters: Any) -> tuple[mx.array, ...]:
    """`function` of all rows `[N, ...]`: arrays `[N, ...]`, computed `size` rows at a time.

    The rows have a gradient, and so do `parameters`, a tree of the trainable parameters of `module` that the function
    reads. The parameters' gradients are summed over the pieces in float32.
    """
    flat = tree_flatten(parameters)
    paths, weights = [path for path, _ in flat], [array for _, array in flat]
    starts = range(0, len(rows), size)

    def piece(start: int, own: mx.array, *given: mx.array) -> tuple[mx.array, ...]:
        former = [_held(module, path) for path in paths]
        module.update(tree_unflatten(list(zip(paths, given, strict=True))))
        try:
            return function(start, own)
        finally:
            module.update(tree_unflatten(list(zip(paths, former, strict=True))))

    @mx.custom_function
    def everywhere(rows: mx.array, given: list[mx.array]) -> tuple[mx.array, ...]:
        parts: list[tuple[mx.array, ...]] = []
        for start in starts:
            own = rows[start : start + size]
            parts.append(piece(start, mx.depends(own, list(parts[-1])) if parts else own, *given))
        return tuple(mx.concatenate(list(of_pieces)) for of_pieces in zip(*parts, strict=True))

    @everywhere.vjp
    def backward(primals: Any, cotangents: Any, _outputs: Any) -> tuple[mx.array, list[mx.array]]:
        rows, given = primals
        found: list[mx.array] = []
        sums: list[mx.array] = []
        for start in starts:
            inputs = [array[start : start + size] for array in (rows, *cotangents)]
            if found:
                inputs = mx.depends(inputs, [found[-1], *sums])
            own, *slopes = inputs
            _, (gradient, *rest) = mx.vjp(partial(piece, start), [own, *given], slopes)
            found.append(gradient)
            rest = [array.astype(mx.float32) for array in rest]
            sums = [total + more for total, more in zip(sums, rest, strict=True)] if sums else rest
        return mx.concatenate(found), [total.astype(array.dtype) for total, array in zip(sums, given, strict=True)]

    return cast(tuple[mx.array, ...], everywhere(rows, weights))


def _held(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = found[int(name) if isinstance(found, list) else name]
    return found
