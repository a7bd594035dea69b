"""LoRA's dropout: on what A multiplies, in the update's own forward pass and nowhere else.

A mask comes from a key that is set for a forward pass, not from global state: so a resumed run drops what the
uninterrupted one would have dropped, and a layer that is computed again in the backward pass drops the same numbers.
Where no key is set (in decoding, in evaluation, for the anchor's logprobs and the reference's) nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

from grpo.model.tensor import cut_of

BLOCK = 256
"""Rows whose mask comes from one key, whether all rows are there at once or a few blocks of them."""

_KEY: ContextVar[tuple[mx.array | None, int]] = ContextVar("dropout's key, and the first row", default=(None, 0))


class LoRADropout(nn.Module):  # type: ignore[misc]  # untyped
    """Takes the place of a LoRA layer's dropout: each number is 0 with probability `p`, or else divided by 1 - p.

    So PEFT's `lora_dropout` and mlx-lm's `dropout` do it. `number` sets the layer's draws apart from other layers'.
    """

    def __init__(self, p: float, number: int, part: int = 0, parts: int = 1) -> None:
        """Of inputs that are divided into `parts` this drops, in number `part`, what is dropped there of the whole."""
        super().__init__()
        self.p, self.number, self.part, self.parts = p, number, part, parts

    def __call__(self, x: mx.array) -> mx.array:
        """`x` itself where no key is set."""
        if (key := dropout_key()) is None:
            return x
        width = x.shape[-1]
        whole = self._kept(x.size // width, self.parts * width, _changed(key, 1, self.number))
        kept = whole[:, self.part * width : (self.part + 1) * width].reshape(x.shape)
        return mx.where(kept, x * (1 / (1 - self.p)), 0)

    def _kept(self, rows: int, width: int, key: mx.array) -> mx.array:
        """Booleans `[rows, width]`."""
        _, first = _KEY.get()
        if first == 0 and rows <= BLOCK:
            return mx.random.bernoulli(1 - self.p, (rows, width), key)
        blocks = range(first // BLOCK, -(-(first + rows) // BLOCK))
        keys = mx.stack([_changed(key, 0, 2 * number) for number in blocks])  # a second pass changes the last bit
        drawn = mx.vmap(lambda key: mx.random.bernoulli(1 - self.p, (BLOCK, width), key))(keys)
        return drawn.reshape(-1, width)[:rows]


def dropout_key() -> mx.array | None:
    """The key that is set, uint32 `[2]`; None where nothing is dropped."""
    return _KEY.get()[0]


@contextmanager
def dropping(key: mx.array | None, first: int = 0) -> Iterator[None]:
    """Draw masks from `key` inside the block; with None drop nothing there.

    `first` is the number of the first row that layers are called with, a multiple of `BLOCK`.
    """
    token = _KEY.set((key, first))
    try:
        yield
    finally:
        _KEY.reset(token)


@contextmanager
def second_pass() -> Iterator[None]:
    """Draw other masks inside the block: it goes through the same layers with other tokens."""
    key = dropout_key()
    with dropping(None if key is None else _changed(key, 0, 1)):
        yield


def add_dropout(model: nn.Module, p: float, part: int = 0, parts: int = 1) -> None:
    """Give every LoRA or DoRA layer of `model` dropout with probability `p`, in place.

    Where its inputs are divided into `parts`, this process has number `part`.
    """
    layers = [module for module in model.modules() if "lora_a" in module]
    for number, layer in enumerate(layers):
        own = (part, parts) if cut_of(layer) == -1 else (0, 1)
        layer.dropout = LoRADropout(p, number, *own)


def _changed(key: mx.array, place: int, number: int) -> mx.array:
    """Another key: MLX's generator is a cipher, so that the draws of two keys have nothing in common."""
    return key ^ mx.array([number if i == place else 0 for i in range(2)], mx.uint32)
