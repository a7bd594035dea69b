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

_KEY: ContextVar[mx.array | None] = ContextVar("dropout's key", default=None)


class LoRADropout(nn.Module):  # type: ignore[misc]  # untyped
    """Takes the place of a LoRA layer's dropout: each number is 0 with probability `p`, or else divided by 1 - p.

    So PEFT's `lora_dropout` and mlx-lm's `dropout` do it. `number` sets the layer's draws apart from other layers'.
    """

    def __init__(self, p: float, number: int) -> None:
        super().__init__()
        self.p, self.number = p, number

    def __call__(self, x: mx.array) -> mx.array:
        """`x` itself where no key is set."""
        if (key := dropout_key()) is None:
            return x
        kept = mx.random.bernoulli(1 - self.p, x.shape, _changed(key, 1, self.number))
        return mx.where(kept, x * (1 / (1 - self.p)), 0)


def dropout_key() -> mx.array | None:
    """The key that is set, uint32 `[2]`; None where nothing is dropped."""
    return _KEY.get()


@contextmanager
def dropping(key: mx.array | None) -> Iterator[None]:
    """Draw masks from `key` inside the block; with None drop nothing there."""
    token = _KEY.set(key)
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


def add_dropout(model: nn.Module, p: float) -> None:
    """Give every LoRA or DoRA layer of `model` dropout with probability `p`, in place."""
    layers = [module for module in model.modules() if "lora_a" in module]
    for number, layer in enumerate(layers):
        layer.dropout = LoRADropout(p, number)


def _changed(key: mx.array, place: int, number: int) -> mx.array:
    """Another key: MLX's generator is a cipher, so that the draws of two keys have nothing in common."""
    return key ^ mx.array([number if i == place else 0 for i in range(2)], mx.uint32)
