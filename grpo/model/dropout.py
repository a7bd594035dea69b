"""LoRA's dropout: applied to the input of A, only in the forward pass of the update.

Masks come from a key that is set for a forward pass, not from global state: so a resumed run drops the same numbers as
an uninterrupted run, and a layer that is recomputed in the backward pass drops the same numbers again. Without a key
(in decoding, in evaluation, for the logprobs of the anchor and the reference) nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

from grpo.model.tensor import cut_of

BLOCK = 256
"""Number of rows whose mask comes from one key, whether all rows are computed together or in tiles of blocks."""

_KEY: ContextVar[tuple[mx.array | None, int]] = ContextVar("dropout's key, and the first row", default=(None, 0))


class LoRADropout(nn.Module):  # type: ignore[misc]  # untyped
    """Replaces a LoRA layer's dropout: each number becomes 0 with probability `p`, or else is divided by 1 - p.

    PEFT's `lora_dropout` and mlx-lm's `dropout` do the same. `number` makes layers' draws differ from each other.
    """

    def __init__(self, p: float, number: int, part: int = 0, parts: int = 1) -> None:
        """For inputs divided into `parts`, the mask of part `part` is that part of the whole inputs' mask."""
        super().__init__()
        self.p, self.number, self.part, self.parts = p, number, part, parts

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the mask. Returns `x` itself if no key is set."""
        if (key := dropout_key()) is None:
            return x
        width = x.shape[-1]
        whole = self._kept(x.size // width, self.parts * width, _changed(key, 1, self.number))
        kept = whole[:, self.part * width : (self.part + 1) * width].reshape(x.shape)
        return mx.where(kept, x * (1 / (1 - self.p)), 0)

    def _kept(self, rows: int, width: int, key: mx.array) -> mx.array:
        """Which numbers are kept: booleans `[rows, width]`."""
        _, first = _KEY.get()
        if first == 0 and rows <= BLOCK:
            return mx.random.bernoulli(1 - self.p, (rows, width), key)
        blocks = range(first // BLOCK, -(-(first + rows) // BLOCK))
        keys = mx.stack(
            [_changed(key, 0, 2 * number) for number in blocks]
        )  # even, because a second pass flips the last bit
        drawn = mx.vmap(lambda key: mx.random.bernoulli(1 - self.p, (BLOCK, width), key))(keys)
        return drawn.reshape(-1, width)[:rows]


def dropout_key() -> mx.array | None:
    """The current key, uint32 `[2]`; None if nothing is dropped."""
    return _KEY.get()[0]


@contextmanager
def dropping(key: mx.array | None, first: int = 0) -> Iterator[None]:
    """Draw masks from `key` inside the block; None drops nothing.

    `first` is the number of the first row in the layers' inputs, a multiple of `BLOCK`.
    """
    token = _KEY.set((key, first))
    try:
        yield
    finally:
        _KEY.reset(token)


@contextmanager
def second_pass() -> Iterator[None]:
    """Draw different masks inside the block, which runs the same layers on other tokens."""
    key = dropout_key()
    with dropping(None if key is None else _changed(key, 0, 1)):
        yield


def add_dropout(model: nn.Module, p: float, part: int = 0, parts: int = 1) -> None:
    """Add dropout with probability `p` to every LoRA or DoRA layer of `model`, in place.

    If a layer's inputs are divided into `parts`, this process has part `part`.
    """
    layers = [module for module in model.modules() if "lora_a" in module]
    for number, layer in enumerate(layers):
        own = (part, parts) if cut_of(layer) == -1 else (0, 1)
        layer.dropout = LoRADropout(p, number, *own)


def _changed(key: mx.array, place: int, number: int) -> mx.array:
    """A different key. MLX's generator is a cipher, so the draws of two keys are independent."""
    return key ^ mx.array([number if i == place else 0 for i in range(2)], mx.uint32)
