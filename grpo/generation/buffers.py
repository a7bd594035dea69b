"""Keys and values: prompts' in prefix places, which a group's rows share, and each slot's own in its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.generation.products import fewest_columns, padded
from grpo.generation.slots import Size, View

KeysValues = tuple[mx.array, mx.array]

PREFILL_CHUNK = 2048
"""Tokens of a prompt that go through the model at once."""
PREFILL_TOKENS = 16_384
"""Tokens of all prompts, padding included, that are prefilled together."""


@dataclass(slots=True)
class Layer:
    """One layer's buffers: prefix `[M, heads, P, D]` and slots' `[S, heads, C, D]`, of keys and of values."""

    prefix_keys: mx.array
    prefix_values: mx.array
    keys: mx.array
    values: mx.array

    def arrays(self) -> list[mx.array]:
        return [self.prefix_keys, self.prefix_values, self.keys, self.values]

    def insert(self, places: mx.array, prompts: KeysValues) -> None:
        """Put prompts' keys and values, `[m, heads, ≤ P, D]`, into prefix places `[m]`."""
        length = prompts[0].shape[2]
        self.prefix_keys[places, :, :length] = prompts[0]
        self.prefix_values[places, :, :length] = prompts[1]

    def write(self, view: View, keys: mx.array, values: mx.array) -> None:
        """Put a step's keys and values, `[S, heads, W, D]`, into their columns."""
        if view.level is not None:  # the same everywhere: a slice is faster than a scatter
            columns = slice(view.level, view.level + view.fed)
            self.keys[:, :, columns], self.values[:, :, columns] = keys, values
            return
        self.keys = _scattered(self.keys, view.columns, keys)
        self.values = _scattered(self.values, view.columns, values)

    def grow(self, size: Size) -> None:
        """Take a larger size, one array after the other. There are new columns behind the others."""
        prefix = max(1, size.prefix)
        self.prefix_keys = _grown(self.prefix_keys, size.places, prefix)
        self.prefix_values = _grown(self.prefix_values, size.places, prefix)
        self.keys = _grown(self.keys, size.slots, size.columns)
        self.values = _grown(self.values, size.slots, size.columns)

    def prompt(self, place: int, length: int) -> KeysValues:
        """A prompt's keys and values, `[1, heads, length, D]`."""
        where = slice(place, place + 1), slice(None), slice(0, length)
        return self.prefix_keys[where], self.prefix_values[where]

    def take(self, slot: int, columns: int) -> KeysValues:
        """A copy of the first columns of a slot, `[1, heads, n, D]`."""
        # By an index, not by a slice: a slice may be a view, and kernels write into the buffer.
        index = mx.arange(columns)
        return self.keys[slot : slot + 1, :, index], self.values[slot : slot + 1, :, index]

    def put(self, slot: int, row: KeysValues) -> None:
        """Put a row's keys and values, `[1, heads, n, D]`, into the first columns of a slot."""
        columns = slice(0, row[0].shape[2])
        self.keys[slot : slot + 1, :, columns], self.values[slot : slot + 1, :, columns] = row

    def keep(self, slots: mx.array, places: mx.array) -> None:
        """Drop all slots and prefix places but these, one array after the other."""
        self.prefix_keys = _made(self.prefix_keys[places])
        self.prefix_values = _made(self.prefix_values[places])
        self.keys = _made(self.keys[slots])
        self.values = _made(self.values[slots])


def _grown(buffer: mx.array, rows: int, columns: int) -> mx.array:
    """The buffer with zeros behind its rows and columns, which attention reads before anything is written there."""
    more = rows - buffer.shape[0], columns - buffer.shape[2]
    return _made(mx.pad(buffer, [(0, more[0]), (0, 0), (0, more[1]), (0, 0)])) if any(more) else buffer


def _made(array: mx.array) -> mx.array:
    """The array, computed: what it was made from is not held any more."""
    mx.eval(array)
    return array


def _scattered(buffer: mx.array, columns: mx.array, new: mx.array) -> mx.array:
    """The buffer with `new` `[S, heads, W, D]` in these columns `[S, W]`."""
    return mx.put_along_axis(buffer, mx.broadcast_to(columns[:, None, :, None], new.shape), new, axis=2)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one layer keeps of one token: heads, their width for keys and for values, and the dtype."""

    heads: int
    key_width: int
    value_width: int
    dtype: mx.Dtype

    @property
    def bytes_per_token(self) -> int:
        return int(self.heads * (self.key_width + self.value_width) * self.dtype.size)

    def layer(self, size: Size) -> Layer:
        """Empty buffers for one layer."""
        prefix = max(1, size.prefix)

        def empty(rows: int, columns: int, width: int) -> mx.array:
            return mx.zeros((rows, self.heads, columns, width), self.dtype)

        return Layer(
            empty(size.places, prefix, self.key_width),
            empty(size.places, prefix, self.value_width),
            empty(size.slots, size.columns, self.key_width),
            empty(size.slots, size.columns, self.value_width),
        )


def cache_shapes(model: nn.Module) -> list[CacheShape] | None:
    """What each layer of a model caches, found by running one token; None unless all of it is plain keys and values."""
    from grpo.model.mlxlm import KVCache, make_prompt_cache

    cache: list[Any] = make_prompt_cache(model)
    if any(type(layer) is not KVCache for layer in cache):
        return None
    model(mx.array([[0]]), cache=cache)
    if any(layer.keys is None for layer in cache):
        return None
    return [CacheShape(k.keys.shape[1], k.keys.shape[3], k.values.shape[3], k.keys.dtype) for k in cache]


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[KeysValues]:
    """Keys and values `[m, heads, P, D]` of prompts without their last tokens, a pair for each layer.

    Prompts are padded on the right, which causal attention does not see, and go through the model in chunks. On a CPU
    they are padded far enough for a prompt's keys and values to be the same to the bit beside any others.
    """
    from grpo.model.mlxlm import make_prompt_cache

    width = max(map(len, prompts)) - 1
    if width == 0:
        return []
    cache: list[Any] = make_prompt_cache(model)
    rows = mx.array([[*ids[:-1], *[0] * (width + 1 - len(ids))] for ids in prompts])
    feed_caches(model, cache, padded(rows, fewest_columns(), 1))
    return [(layer.keys[:, :, :width], layer.values[:, :, :width]) for layer in cache]


def feed_caches(model: nn.Module, caches: Sequence[Any], rows: mx.array) -> None:
    """Let tokens `[m, T]` go through the model, in chunks, onto mlx-lm's caches."""
    for start in range(0, rows.shape[1], PREFILL_CHUNK):
        model(rows[:, start : start + PREFILL_CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches])  # the logits stay unevaluated
