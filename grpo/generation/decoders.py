"""One decoding step of a model: tokens in, logits out, with keys and values in the buffers of an `Attention`.

`BlockDecoder` computes a Llama-like model from its joined weights; `ModelDecoder` runs any model whose attention calls
mlx-lm's `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.cuda import available
from grpo.backend.maths import silu
from grpo.generation.attention import Attention
from grpo.generation.blocks import Block, Blocks
from grpo.generation.buffers import Layer
from grpo.generation.cuda_attention import CudaAttention
from grpo.generation.cuda_layers import add_and_norm, gated
from grpo.generation.products import fewest_rows, padded
from grpo.generation.slots import View, Where
from grpo.model.attending import asking_caches, attends


class Decoder(Protocol):
    """Computes a model's decoding step. S slots of W tokens each, V tokens in the vocabulary."""

    copied: int
    """Bytes of weight copies, in addition to the model's own weights, between `refresh` and `forget`."""

    def refresh(self) -> None:
        """Read the model's arrays again: they may have been replaced."""
        ...

    def forget(self) -> None:
        """Release the weights that train, which may be replaced, and all copies of weights, until `refresh`."""
        ...

    def logits(self, tokens: mx.array, layers: Sequence[Layer], attention: Attention, view: View) -> mx.array:
        """Feed W tokens to each slot, `[S, W]`, and return logits `[S, W, V]` in the model's dtype."""
        ...


class BlockDecoder:
    """Decodes a Llama-like model by its blocks."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._halved = available() and blocks.halve()
        self.copied = 0 if self._halved else blocks.merge()
        self._compiled: Callable[..., mx.array] | None = None

    def refresh(self) -> None:
        if self.blocks.refresh() and not self.blocks.train:
            self._compiled = None  # a trace keeps the weights that it was made with, unless they are its inputs

    def forget(self) -> None:
        self.blocks.forget()

    def logits(self, tokens: mx.array, layers: Sequence[Layer], attention: Attention, view: View) -> mx.array:
        if not attention.overlaps:
            return self._logits(tokens, layers, attention, view)
        # The kernels read all positions from arrays, so one trace works for every step.
        if self._compiled is None:
            self._compiled = self._trace(attention)
        return self._compiled(tokens, [layer.arrays() for layer in layers], view.where)

    def _trace(self, attention: Attention) -> Callable[..., mx.array]:
        def logits(tokens: mx.array, buffers: list[list[mx.array]], where: Where) -> mx.array:
            return self._logits(tokens, [Layer(*arrays) for arrays in buffers], attention, where)

        # A trace keeps the arrays that it was made with, except its inputs.
        blocks = self.blocks
        inputs = blocks.arrays if blocks.train else [product.lora for product in blocks.products]
        traced: Callable[..., mx.array] = mx.compile(logits, inputs=inputs)
        return traced

    def _logits(self, tokens: mx.array, layers: Sequence[Layer], attention: Attention, view: View | Where) -> mx.array:
        blocks, rows = self.blocks, tokens.size
        # Only attention needs to know the slots: all other operations see a list of tokens.
        hidden = blocks.embed(padded(tokens.flatten(), fewest_rows(), 0))
        if self._halved and isinstance(attention, CudaAttention):
            hidden = self._through_kernels(hidden, layers, attention, view)
            return blocks.head(hidden)[:rows].reshape(*tokens.shape, -1)
        for block, layer in zip(blocks.layers, layers, strict=True):
            hidden = self._layer(block, hidden, layer, attention, view)
        return blocks.head(blocks.norm(hidden))[:rows].reshape(*tokens.shape, -1)

    def _through_kernels(
        self, hidden: mx.array, layers: Sequence[Layer], attention: CudaAttention, view: View | Where
    ) -> mx.array:
        """All layers and the last norm, with eight kernels per layer: `[S · W, H]`."""
        blocks = self.blocks
        norms = [*(block.before_attention for block in blocks.layers[1:]), blocks.norm]
        normed = blocks.layers[0].before_attention(hidden)
        for block, layer, norm in zip(blocks.layers, layers, norms, strict=True):
            attended = attention.attend_half(layer, block.qkv.half(normed), block, blocks, view)
            hidden, normed = add_and_norm(hidden, block.out.half(attended), block.before_mlp)
            inner = gated(block.gate_up.half(normed), block.gate_up.outs[0])
            hidden, normed = add_and_norm(hidden, block.down.half(inner), norm)
        return normed

    def _layer(
        self, block: Block, hidden: mx.array, layer: Layer, attention: Attention, view: View | Where
    ) -> mx.array:
        qkv = block.qkv(block.before_attention(hidden))
        hidden = block.out(attention.attend_joined(layer, qkv, block, self.blocks, view), onto=hidden)
        gate, up = mx.split(block.gate_up(block.before_mlp(hidden)), 2, axis=-1)
        return block.down(silu(gate) * up, onto=hidden)


class ModelDecoder:
    """Decodes any model with plain keys and values by its own forward pass."""

    copied = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._files: list[ModuleType] = []

    def refresh(self) -> None:
        """Find the Python modules with the model's layers. Decoding uses the model's own arrays."""
        self._files = attends(self.model)

    def forget(self) -> None:
        """Nothing to do: this object holds no arrays."""

    def logits(self, tokens: mx.array, layers: Sequence[Layer], attention: Attention, view: View) -> mx.array:
        slots, width = tokens.shape
        filled = padded(tokens, -(-fewest_rows() // width), 0)
        cache = [_LayerCache(layer, attention, view, len(filled)) for layer in layers]
        with asking_caches(self._files):
            logits: mx.array = self.model(filled, cache=cache)
        return logits[:slots]


class _LayerCache:
    """One layer's buffers as an mlx-lm cache, for one step."""

    def __init__(self, layer: Layer, attention: Attention, view: View, rows: int) -> None:
        """`rows` rows go through the model: first those of the slots, then padding for the products."""
        self._layer, self._attention, self._view, self._rows = layer, attention, view, rows

    @property
    def offset(self) -> mx.array:
        return padded(self._view.positions, self._rows, 0)

    def make_mask(self, _n: int, **_kwargs: Any) -> None:
        """Return no mask: `attend` knows which columns each row may see."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        if sinks is not None:
            raise ValueError("this model's attention has sinks")
        if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
            raise ValueError("this model's attention adds a bias to its scores")
        slots = len(self._view.place_of)
        unpadded = (queries[:slots], keys[:slots], values[:slots])
        return padded(self._attention.attend(self._layer, *unpadded, scale, self._view), self._rows, 0)
