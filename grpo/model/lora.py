"""mlx-lm's LoRA layer, computed in fewer passes over memory: y = x W + s x A B.

mlx-lm's layer multiplies by the scale and adds, forward and backward, in arrays as large as the layer's output. On a
GPU this took as long as the products themselves. Here the scale and the sum are part of the preceding product.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from grpo.model.mlxlm import LoRALinear
from grpo.model.tensor import ByColumn, ByRow, hand_over


class FoldedLoRALinear(LoRALinear):  # type: ignore[misc]  # untyped
    """A `LoRALinear` over a frozen base. Parameters and files have mlx-lm's names and shapes.

    With dropout, MLX computes the gradient, because the inputs of A and of the base then differ.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in]` to `[..., out]`, in the dtype of `x`."""
        flat = x.reshape(-1, x.shape[-1])
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        if (dropped := self.dropout(flat)) is flat:
            out = _folded(self.linear, self.scale, flat, a, b)
        else:
            out = mx.addmm(self.linear(flat), dropped @ a, b, alpha=self.scale)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _folded(base: nn.Module, scale: float, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    @mx.custom_function
    def layer(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        low = x @ a
        return mx.addmm(base(x), low, b, alpha=scale), low

    @layer.vjp
    def backward(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        (x, a, b), (dy, _), (_, low) = primals, cotangents, outputs
        _, (dx,) = mx.vjp(base, [x], [dy])
        dlow = dy @ b.T
        return mx.addmm(dx, dlow, a.T, alpha=scale), scale * (x.T @ dlow), scale * (low.T @ dy)

    y, _ = cast(tuple[mx.array, mx.array], layer(x, a, b))
    return y


class ColumnLoRALinear(ByColumn, FoldedLoRALinear):
    """LoRA over a base divided by column: A is whole, B `[r, out / n]` is a part."""


class RowLoRALinear(ByRow, FoldedLoRALinear):
    """LoRA over a base divided by row: A `[in / n, r]` is a part, B is whole. One sum covers base and adapter."""


def fold(model: nn.Module) -> None:
    """Replace every LoRA layer over a linear layer by `FoldedLoRALinear`, in place."""
    for module in model.modules():
        if type(module) is LoRALinear:
            module.__class__ = FoldedLoRALinear
            hand_over(module, ColumnLoRALinear, RowLoRALinear)
