"""Rotary embeddings on CUDA for heads in which only a few numbers rotate.

MLX's CUDA kernel uses rows and heads as the third dimension of its thread blocks, which CUDA limits to 64. If fewer
than 32 numbers of a head rotate, 128 rows of one token each (packed tokens with their own positions, or decoding slots)
exceed the limit: "cudaGraphAddKernelNode failed: invalid argument".
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

FEW = 32
"""With at least this many rotating numbers per head, MLX's kernel always works."""


class FewTurned(nn.RoPE):  # type: ignore[misc]
    """`nn.RoPE` in stock operations: float32 angles, and an output in the input's dtype."""

    def __call__(self: Any, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate `[B, …, T, D]`. `offset` is the position of the first token: an integer, or an array with one position
        for all rows, or `[B]`."""
        half, first = self.dims // 2, mx.array(offset).reshape(-1, 1)
        positions = self.scale * (first + mx.arange(x.shape[-2]))
        angles = positions[..., None] * mx.exp(mx.arange(half) * (-math.log(self.base) / half))
        angles = angles.reshape(-1, *[1] * (x.ndim - 3), *angles.shape[1:])  # the same for all heads
        cos, sin, turns = mx.cos(angles), mx.sin(angles), x[..., : self.dims].astype(mx.float32)
        if self.traditional:
            one, other = turns[..., ::2], turns[..., 1::2]
        else:
            one, other = turns[..., :half], turns[..., half:]
        turned = [one * cos - other * sin, one * sin + other * cos]
        joined = mx.stack(turned, -1).reshape(turns.shape) if self.traditional else mx.concatenate(turned, -1)
        return mx.concatenate([joined.astype(x.dtype), x[..., self.dims :]], -1)


def turn_by_stock_operations(model: nn.Module) -> None:
    """Make rotary embeddings that rotate fewer than `FEW` numbers per head use stock operations, in place."""
    for module in model.modules():
        if type(module) is nn.RoPE and module.dims < FEW:
            module.__class__ = FewTurned
