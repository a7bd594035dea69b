"""A function of rows in pieces: one after the other, and gradients that add up exactly."""

from __future__ import annotations

from io import StringIO

import mlx.core as mx
import mlx.nn as nn

from grpo.model.pieces import in_pieces


def weighted(rows: mx.array, weight: mx.array, size: int) -> mx.array:
    module = nn.Module()
    module.weight = weight
    (found,) = in_pieces(lambda _, own: (own * module.weight,), rows, size, module, {"weight": weight})
    return found


def test_gradients_of_many_pieces_add_up_in_float32() -> None:
    """In bfloat16 256 + 1 is 256."""
    rows, weight = mx.ones((600, 1), mx.bfloat16), mx.ones(1, mx.bfloat16)
    found = mx.grad(lambda weight: weighted(rows, weight, 1).astype(mx.float32).sum())(weight)
    assert (found.item(), found.dtype) == (600, mx.bfloat16)


def test_each_piece_waits_for_the_one_before() -> None:
    drawing = StringIO()
    mx.export_to_dot(drawing, weighted(mx.ones((10, 2)), mx.ones(2), 4))
    assert drawing.getvalue().count('"Depends"') == 2  # of three pieces
