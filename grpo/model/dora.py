"""mlx-lm's DoRA layer without the whole matrix: y = m / |W + s (A B)ᵀ| ∘ (x Wᵀ + s x A B), arXiv 2402.09353.

mlx-lm's layer computes W + s (A B)ᵀ at every call to take the norms of its rows, and dequantizes a quantized W for it.
The backward pass keeps these copies: during an update all layers' copies exist together, as large as the model before
it was quantized. A row's norm needs neither: |w + s d|² = |w|² + 2 s w·d + s² |d|², where d is a row of (A B)ᵀ, w·d
comes from the product W A, and |d|² from AᵀA.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from grpo.errors import UserError
from grpo.model.mlxlm import DoRALinear
from grpo.model.quantized import inputs_of
from grpo.model.tensor import ByColumn, ByRow, hand_over, summed


class FoldedDoRALinear(DoRALinear):  # type: ignore[misc]  # untyped
    """A `DoRALinear` over a frozen base. Parameters and files have mlx-lm's names and shapes."""

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in]` to `[..., out]`, in the dtype of `x`."""
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        y = mx.addmm(_product(self.linear, flat), self.dropout(flat) @ a, b, alpha=self.scale)
        y = (self.m / self._norms()).astype(x.dtype) * y
        if "bias" in self.linear:
            y = y + self.linear.bias
        out: mx.array = y.reshape(*x.shape[:-1], y.shape[-1])
        return out

    def _norms(self) -> mx.array:
        """The norms of the rows of W + s (A B)ᵀ, `[out]` float32. As in the paper, they carry no gradient."""
        a, b = (mx.stop_gradient(array).astype(mx.float32) for array in (self.lora_a, self.lora_b))
        across = _product(self.linear, mx.stop_gradient(self.lora_a).T).astype(mx.float32)  # (W A)ᵀ
        own = (a.T @ a) @ b
        squares = self._squares + (b * (2 * self.scale * across + self.scale**2 * own)).sum(axis=0)
        return mx.sqrt(self._whole(squares))

    def _whole(self, squares: mx.array) -> mx.array:
        """The sum over all inputs, from `squares` summed over this process's inputs."""
        return squares


class ColumnDoRALinear(ByColumn, FoldedDoRALinear):
    """DoRA over a base divided by column: A is whole; B `[r, out / n]` and the magnitudes `[out / n]` are parts."""


class RowDoRALinear(ByRow, FoldedDoRALinear):
    """DoRA over a base divided by row: A `[in / n, r]` is a part; B and the magnitudes are whole."""

    def _whole(self, squares: mx.array) -> mx.array:
        return summed(squares, self.group)


def _product(base: nn.Module, x: mx.array) -> mx.array:
    """x Wᵀ, without the bias."""
    if "scales" not in base:
        plain: mx.array = x @ base.weight.T
        return plain
    product: mx.array = mx.quantized_matmul(
        x, base["weight"], base["scales"], base.get("biases"),
        transpose=True, group_size=base.group_size, bits=base.bits, mode=base.mode,
    )  # fmt: skip
    return product


def _check_inputs(model: nn.Module) -> None:
    """Raise UserError if mlx-lm's DoRA has miscounted a quantized layer's inputs, as it does with 3, 5 and 6 bits."""
    for path, module in model.named_modules():
        base = module.get("linear") if "lora_a" in module else None
        if isinstance(base, nn.QuantizedLinear) and module.lora_a.shape[0] != inputs_of(base):
            raise UserError(
                f"adapter.type: dora: mlx-lm's DoRA does not support {path}, whose weights have {base.bits} bits: use "
                "lora, or a model with 2, 4 or 8 bits"
            )


def fold_magnitudes(model: nn.Module) -> None:
    """Replace every new DoRA layer of mlx-lm by `FoldedDoRALinear`. Its magnitudes must still be the norms of W."""
    _check_inputs(model)
    for module in model.modules():
        if type(module) is DoRALinear:
            module.__class__ = FoldedDoRALinear
            module._squares = mx.square(module.m)  # |w|² of each row; the underscore keeps it out of the parameters
            hand_over(module, ColumnDoRALinear, RowDoRALinear)
            module.m = mx.sqrt(module._whole(module._squares))
