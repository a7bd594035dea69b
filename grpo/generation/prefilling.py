"""Prefill: computes the keys and values of prompts, and writes them straight into prefix places."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.device import on_gpu
from grpo.generation.buffers import KeysValues, Layer, feed_caches, prefill_chunk
from grpo.generation.products import fewest_columns, padded
from grpo.model.attending import InTiles, mlx_lms
from grpo.model.attention import PromptKeysValues, attention
from grpo.model.sight import Causal
from grpo.model.tiles import NARROWEST


class PlaceCache:
    """Some prefix places of a layer, with the interface of mlx-lm's `KVCache`.

    A chunk of tokens sees its own keys and values as computed, and those of earlier chunks as stored.
    """

    def __init__(self, layer: Layer, places: mx.array, offset: int = 0) -> None:
        """The first `offset` tokens are in the places already."""
        self._layer, self._places, self.offset = layer, places, offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        first, self.offset = self.offset, self.offset + keys.shape[2]
        seen, earlier = (keys, values), None
        if first:
            earlier = self._layer.prompts(self._places, first)
            seen = mx.concatenate([earlier[0], keys], axis=2), mx.concatenate([earlier[1], values], axis=2)
        self._layer.insert(self._places, (keys, values), first)
        self._last = seen, earlier, (keys, values)
        return seen

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any, sinks: mx.array | None
    ) -> mx.array:
        """Causal attention in tiles; any other attention is left to mlx-lm's."""
        seen, earlier, new = self._last
        del self._last  # otherwise every layer would hold these arrays until the next chunk
        causal = mask is None if queries.shape[2] == 1 else isinstance(mask, str) and mask == "causal"
        if not causal or keys is not seen[0] or values is not seen[1]:
            return mlx_lms(queries, keys, values, scale, mask, sinks)
        prompts = None if earlier is None else PromptKeysValues(*earlier, mx.arange(len(queries)))
        return attention(queries, *new, scale, Causal(), prompts, sinks, gradient=False)

    def make_mask(self, *tokens: Any, **settings: Any) -> Any:
        from grpo.model.mlxlm import KVCache

        return KVCache.make_mask(self, *tokens, **settings)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate after each chunk."""
        return self._layer.arrays()


def prefill(
    model: nn.Module, prompts: Sequence[Sequence[int]], layers: Sequence[Layer], places: Sequence[int], first: int = 0
) -> None:
    """Compute the keys and values of prompts, without their last tokens, and write them into prefix places, which hold
    those of the first `first` tokens already.

    Prompts are padded on the right, where causal attention does not see the padding, and go through the model in
    chunks. On a CPU, there is enough padding to make a prompt's keys and values the same to the bit whatever other
    prompts are computed with it, and attention and gated layers are computed as in training.
    """
    width = max(map(len, prompts)) - 1 - first
    if width == 0:
        return
    rows = mx.array([[*ids[first:-1], *[0] * (width + 1 + first - len(ids))] for ids in prompts])
    caches = [PlaceCache(layer, mx.array(list(places)), first) for layer in layers]
    last = width % prefill_chunk() % NARROWEST  # the width of the last tile of the last chunk
    least = width - last + fewest_columns() if last else width
    with nullcontext() if on_gpu() else InTiles(model).begun():
        feed_caches(model, caches, padded(rows, least, 1), width)
