"""Several linear layers with the same input as one product, including their low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.cuda import available, overwrite_rows
from grpo.generation import cuda_products
from grpo.generation.products import fewest_columns, padded
from grpo.model.tensor import ByRow, summed

WEIGHTS = ("weight", "scales", "biases", "bias")
"""The arrays of a linear layer, quantized or not, each with one row per output."""
QUANTIZATION = ("mode", "bits", "group_size")
"""The attributes that must be equal for layers to count as quantized alike."""
ALIGNMENT = 16
"""The number of rows below a matrix is a multiple of this, so that every row of the product is aligned."""
MOST_RANKS = 64
"""Largest rank of an adapter for which kernels apply B."""


class Unread(ValueError):
    """A model cannot be read as blocks. The message is the reason."""


class LastSeen:
    """Detects when any of a list of arrays has been replaced by another array object."""

    def __init__(self) -> None:
        self._held: list[mx.array] = []

    def changed(self, arrays: Sequence[mx.array]) -> bool:
        """Whether these are other array objects than at the last call."""
        former, self._held = self._held, list(arrays)
        return len(former) != len(arrays) or any(a is not b for a, b in zip(arrays, former, strict=True))

    def forget(self) -> None:
        """Release the arrays: the next call of `changed` returns True."""
        self._held = []


@dataclass(frozen=True, slots=True)
class Half:
    """A product of N rows to which the adapters' A is applied, but not yet their B.

    base `[N, ≥ outs]` is the product with the weights, without the bias; low `[N, ≥ first + sum of ranks]` holds x @ A
    of each layer, one layer after the other, from column `first` on; b `[most ranks, outs]` holds each layer's B,
    scaled, in the columns of the layer's outputs; `ranks` has one entry per layer, 0 for a layer without an adapter;
    bias `[outs]` or None.
    """

    base: mx.array
    low: mx.array
    first: int
    b: mx.array
    ranks: tuple[int, ...]
    bias: mx.array | None

    def whole(self, outs: Sequence[int]) -> mx.array:
        """The product with B and bias applied by stock operations, `[N, outs]`. Kernels apply them themselves."""
        parts, begin, low = [], 0, self.first
        for width, ranks in zip(outs, self.ranks, strict=True):
            part, end = self.base[..., begin : begin + width], begin + width
            if ranks:
                part = mx.addmm(part, self.low[..., low : low + ranks], self.b[:ranks, begin:end])
            parts.append(part if self.bias is None else part + self.bias[begin:end])
            begin, low = end, low + ranks
        return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


class Products:
    """Several linear layers with the same input as one product, and their LoRA as another: `x` `[S, in]` to
    `[S, sum of outs]`.

    The layers' own weights become views of the joined matrix, so that no weight is stored twice. If kernels apply B
    (`halve`), the rows of A lie below that matrix, so that one product computes both.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Raises Unread if a layer is not linear, is not quantized like the others, or has an adapter that cannot be
        joined; or if only some layers have a bias."""
        self._layers = layers
        self._bases = [layer.linear if "lora_a" in layer else layer for layer in layers]
        kinds = {
            (isinstance(base, nn.QuantizedLinear), *(getattr(base, name, None) for name in QUANTIZATION))
            for base in self._bases
        }
        if len(kinds) > 1 or not isinstance(self._bases[0], (nn.Linear, nn.QuantizedLinear)):
            raise Unread("layers that share an input are not linear, or not quantized alike")
        self._row = next((layer for layer in (*layers, *self._bases) if isinstance(layer, ByRow)), None)
        if any("m" in layer for layer in layers):
            raise Unread("adapters with magnitudes (DoRA) cannot be joined")
        if len({"bias" in base for base in self._bases}) > 1:
            raise Unread("only some of the layers that share an input have a bias")
        self.outs = tuple(_outputs(layer) for layer in layers)
        self.ranks = tuple(int(layer.lora_b.shape[0]) if "lora_a" in layer else 0 for layer in layers)
        self._halved = self._merges = False
        self._weights, self._adapters = LastSeen(), LastSeen()
        self.joined: dict[str, mx.array] = {}
        """The joined matrix, its bias and its scales, by their names in a layer. Always the same dictionary object."""
        self.lora: dict[str, mx.array] = {}
        """The joined adapters; empty without adapters. Always the same dictionary object.

        `a` is `[in, ranks]`; it is missing if A lies below the joined matrix. `b` is `[ranks, sum of outs]`, or
        `[most ranks, sum of outs]` if kernels apply it. If the adapters are merged, the only entry is `merged`
        `[sum of outs, in]`: a copy of the joined matrix with all adapters added.
        """

    @property
    def divided(self) -> bool:
        """Whether other processes have parts of the input, so that the product must be summed over the processes."""
        return self._row is not None

    @property
    def quantised(self) -> bool:
        return _is_quantised(self._bases[0])

    @property
    def dtype(self) -> mx.Dtype | None:
        """The dtype that the product computes in; None: its input's dtype (scales of one byte do not determine it)."""
        held: mx.Dtype = self._bases[0].scales.dtype if self.quantised else self._bases[0].weight.dtype
        return held if mx.issubdtype(held, mx.floating) else None

    def halve(self) -> None:
        """From the next `refresh` on, prepare the product for kernels that apply B."""
        self._halved = max(self.ranks) <= MOST_RANKS
        self._weights.forget()
        self._adapters.forget()

    def merge(self) -> None:
        """From the next `refresh` on, use a copy of the matrix with the adapters merged in."""
        self._merges = True
        self._adapters.forget()

    @property
    def copied(self) -> int:
        """Bytes of the copy that merging the adapters needs; 0 without adapters."""
        return sum(base.weight.nbytes for base in self._bases) if any(self.ranks) else 0

    @property
    def _below(self) -> int:
        """The number of rows below the joined matrix."""
        if not self._halved or self.quantised:
            return 0
        return -(-sum(self.ranks) // ALIGNMENT) * ALIGNMENT

    def refresh(self, dtype: mx.Dtype) -> bool:
        """Read the layers' arrays again, and return whether more than the adapters has changed."""
        joined = self._weights.changed(self._held())
        if joined:
            self._join()
            self._weights.changed(self._held())
        adapters = [layer[name] for layer in self._layers for name in ("lora_a", "lora_b") if name in layer]
        if adapters and (self._adapters.changed(adapters) or (joined and (self._below or self._merges))):
            self._take_adapters(dtype)
        return joined

    @property
    def train(self) -> bool:
        """Whether the layers' own weights train (not only adapters), or are released during an update."""
        return any(tree_flatten(b.trainable_parameters()) or getattr(b, "spread", False) for b in self._bases)

    def forget(self) -> None:
        """Release the arrays that an update replaces (a matrix that trains, a merged copy), until `refresh`."""
        if self.train:
            self.joined.clear()
            self._weights.forget()
        if self._merges:
            self.lora.clear()
            self._adapters.forget()

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        """The product, added to `onto` if that is given."""
        if self._row is not None:  # other processes have other parts of the input
            y = summed(self._product(x, None), self._row.group)
            return y if onto is None else onto + y
        return self._product(x, onto)

    def _product(self, x: mx.array, onto: mx.array | None) -> mx.array:
        if self._halved:
            y = self.half(x).whole(self.outs)
            return y if onto is None else onto + y
        y = self._base(x, onto)
        if "bias" in self.joined:
            y = y + self.joined["bias"]
        return mx.addmm(y, x @ self.lora["a"], self.lora["b"]) if "a" in self.lora else y

    def half(self, x: mx.array) -> Half:
        """The product of `[N, in]` for kernels that apply B. If an adapter has too many ranks, B is already applied."""
        bias = self.joined.get("bias")
        if not self._halved:
            y = self(x)
            return Half(y, y, 0, y, (0,) * len(self.outs), None)
        y = self._base(x, None)
        if not self.lora:
            return Half(y, y, 0, y, self.ranks, bias)
        low, first = (x @ self.lora["a"], 0) if "a" in self.lora else (y, sum(self.outs))
        return Half(y, low, first, self.lora["b"], self.ranks, bias)

    def _base(self, x: mx.array, onto: mx.array | None) -> mx.array:
        weight = self.lora.get("merged", self.joined["weight"])
        first = self._bases[0]
        if not isinstance(first, nn.QuantizedLinear):
            if self._halved and onto is None and cuda_products.serves(x, weight):
                return cuda_products.product(x, weight)
            return x @ weight.T if onto is None else mx.addmm(onto, x, weight.T)
        y = mx.quantized_matmul(
            x, weight, self.joined["scales"], self.joined.get("biases"),
            transpose=True, group_size=first.group_size, bits=first.bits, mode=first.mode,
        )  # fmt: skip
        return y if onto is None else onto + y

    def _held(self) -> list[mx.array]:
        return [base[name] for base in self._bases for name in WEIGHTS if name in base]

    def _join(self) -> None:
        names = [name for name in WEIGHTS if name in self._bases[0]]
        parts = {name: [base[name] for base in self._bases] for name in names}
        if self._below:
            weight = self._bases[0].weight
            parts["weight"].append(mx.zeros((self._below, weight.shape[1]), weight.dtype))
        self.joined.update({name: mx.concatenate(arrays) for name, arrays in parts.items()})
        del parts
        mx.eval(self.joined)
        start = 0
        for base, outs in zip(self._bases, self.outs, strict=True):
            for name in names:
                base[name] = self.joined[name][start : start + outs]
            start += outs
        mx.eval(self._held())

    def _take_adapters(self, dtype: mx.Dtype) -> None:
        if not self._halved:
            lora = _joined_lora(self._layers, dtype)
            if self._merges:
                lora = {"merged": mx.addmm(self.joined["weight"], lora["b"].T, lora["a"].T)}
            self.lora.update(lora)
            return
        a = mx.concatenate([layer.lora_a for layer in self._layers if "lora_a" in layer], axis=1)
        self.lora["b"] = _stacked_b(self._layers, self.outs, max(self.ranks), dtype)
        if not self._below:
            self.lora["a"] = a.astype(dtype)
        elif available():
            mx.eval(overwrite_rows(self.joined["weight"], sum(self.outs), a.T.astype(dtype)))
        else:
            self._rejoin(a.T.astype(dtype))

    def _rejoin(self, below: mx.array) -> None:
        """Write the rows below the matrix without a kernel, by making a new matrix."""
        end = sum(self.outs)
        self.joined["weight"][end : end + below.shape[0]] = below
        mx.eval(self.joined)


def _joined_lora(layers: Sequence[Any], dtype: mx.Dtype) -> dict[str, mx.array]:
    """A of all layers with an adapter, `[in, ranks]`, and their B, scaled, as diagonal blocks of `[ranks, outs]`."""
    a = mx.concatenate([layer.lora_a for layer in layers if "lora_a" in layer], axis=1)
    outs = [_outputs(layer) for layer in layers]
    rows = [
        mx.pad(layer.lora_b * layer.scale, [(0, 0), (sum(outs[:i]), sum(outs[i + 1 :]))])
        for i, layer in enumerate(layers)
        if "lora_a" in layer
    ]
    a, b = padded(a, fewest_columns(), 1), padded(mx.concatenate(rows), fewest_columns(), 0)
    return {"a": a.astype(dtype), "b": b.astype(dtype)}


def _stacked_b(layers: Sequence[Any], outs: Sequence[int], ranks: int, dtype: mx.Dtype) -> mx.array:
    """The B of all layers, scaled, side by side: `[ranks, outs]`; zeros if a layer has fewer ranks or no adapter."""
    columns = [
        mx.pad(layer.lora_b * layer.scale, [(0, ranks - layer.lora_b.shape[0]), (0, 0)])
        if "lora_a" in layer
        else mx.zeros((ranks, width))
        for layer, width in zip(layers, outs, strict=True)
    ]
    return mx.concatenate(columns, axis=1).astype(dtype)


def _is_quantised(base: nn.Module) -> bool:
    return isinstance(base, nn.QuantizedLinear)


def _outputs(layer: Any) -> int:
    return int((layer.linear if "lora_a" in layer else layer).weight.shape[0])
