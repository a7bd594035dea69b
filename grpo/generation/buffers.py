"""Buffers of keys and values: prefix places hold prompts, which a group's rows share; slots hold each row's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.device import on_gpu
from grpo.generation.products import product
from grpo.generation.slots import Size, View

KeysValues = tuple[mx.array, mx.array]

PREFILL_CHUNK, CPU_CHUNK = 2048, 256
"""Tokens of a prompt that go through the model in one chunk, on a GPU and on a CPU. A CPU holds a chunk's attention
scores, and small chunks are faster there: a prompt of 4,096 tokens took 3.9 s and 32 MB instead of 5.3 s and 169 MB."""
PREFILL_TOKENS = 16_384
"""The largest number of prompt tokens, including padding, that are prefilled together."""


@dataclass(slots=True)
class Layer:
    """One layer's buffers of keys and values: prefix places `[M, heads, P, D]` and slots `[S, heads, C, D]`."""

    prefix_keys: mx.array
    prefix_values: mx.array
    keys: mx.array
    values: mx.array

    def arrays(self) -> list[mx.array]:
        return [self.prefix_keys, self.prefix_values, self.keys, self.values]

    def insert(self, places: mx.array, prompts: KeysValues, first: int = 0) -> None:
        """Write prompts' keys and values, `[m, heads, n, D]`, into prefix places `[m]` from column `first` on.

        Columns that do not fit are left out, because prompts may be padded.
        """
        columns = slice(first, min(first + prompts[0].shape[2], self.prefix_keys.shape[2]))
        keys, values = (array[:, :, : columns.stop - first] for array in prompts)
        self.prefix_keys[places, :, columns], self.prefix_values[places, :, columns] = keys, values

    def prompts(self, places: mx.array, length: int) -> KeysValues:
        """The first columns of prefix places `[m]`: `[m, heads, length, D]`."""
        return self.prefix_keys[places, :, :length], self.prefix_values[places, :, :length]

    def write(self, view: View, keys: mx.array, values: mx.array) -> None:
        """Write a step's keys and values, `[S, heads, W, D]`, into their columns."""
        if view.level is not None:  # all slots write the same columns: a slice is faster than a scatter
            columns = slice(view.level, view.level + view.fed)
            self.keys[:, :, columns], self.values[:, :, columns] = keys, values
            return
        self.keys = _scattered(self.keys, view.columns, keys)
        self.values = _scattered(self.values, view.columns, values)

    def grow(self, size: Size) -> None:
        """Grow to a larger size, one array after the other. New columns follow the old ones."""
        prefix = max(1, size.prefix)
        self.prefix_keys = _grown(self.prefix_keys, size.places, prefix)
        self.prefix_values = _grown(self.prefix_values, size.places, prefix)
        self.keys = _grown(self.keys, size.slots, size.columns)
        self.values = _grown(self.values, size.slots, size.columns)

    def prompt(self, place: int, length: int) -> KeysValues:
        """A prompt's keys and values, `[1, heads, length, D]`."""
        where = slice(place, place + 1), slice(None), slice(0, length)
        return self.prefix_keys[where], self.prefix_values[where]

    def take(self, slot: int, columns: int) -> Any:
        """A copy of the first `columns` columns of a slot: keys and values `[1, heads, n, D]`."""
        # Index rather than slice: a slice may be a view, and kernels write into the buffer.
        index = mx.arange(columns)
        return self.keys[slot : slot + 1, :, index], self.values[slot : slot + 1, :, index]

    def put(self, slot: int, row: KeysValues, first: int = 0) -> None:
        """Write a row's keys and values, `[1, heads, n, D]`, into a slot from column `first` on."""
        columns = slice(first, first + row[0].shape[2])
        self.keys[slot : slot + 1, :, columns], self.values[slot : slot + 1, :, columns] = row

    def put_back(self, slot: int, taken: Any) -> None:
        """Write what `take` has returned into the first columns of a slot."""
        self.put(slot, taken)

    def numbers(self, taken: Any) -> KeysValues:
        """The keys and values in what `take` has returned."""
        keys, values = taken
        return keys, values

    def scores(self, queries: mx.array, width: int) -> mx.array:
        """queries `[S, heads, p, n, D]` times the keys of the first columns: `[S, heads, p, n, width]`."""
        return queries @ self.keys[:, :, None, :width].swapaxes(-1, -2)

    def weighed(self, weights: mx.array) -> mx.array:
        """weights `[S, heads, p, n, width]` times the values of the slots' first columns: `[S, heads, p, n, E]`."""
        return weights.astype(self.values.dtype) @ self.values[:, :, None, : weights.shape[-1]]

    def prompt_scores(self, queries: mx.array) -> mx.array:
        """queries `[M, heads, n, D]` times the keys of the prompts: `[M, heads, n, P]`."""
        return product(queries, self.prefix_keys.swapaxes(-1, -2))

    def prompts_weighed(self, weights: mx.array) -> mx.array:
        """weights `[M, heads, n, P]` times the values of the prompts: `[M, heads, n, E]`."""
        return product(weights.astype(self.prefix_values.dtype), self.prefix_values)

    def keep(self, slots: mx.array, places: mx.array) -> None:
        """Keep only these slots and prefix places, one array after the other."""
        self.prefix_keys = _made(self.prefix_keys[places])
        self.prefix_values = _made(self.prefix_values[places])
        self.keys = _made(self.keys[slots])
        self.values = _made(self.values[slots])


def _grown(buffer: mx.array, rows: int, columns: int) -> mx.array:
    """The buffer with rows and columns added at the end. They are zeros, because attention may read them unwritten."""
    more = rows - buffer.shape[0], columns - buffer.shape[2]
    return _made(mx.pad(buffer, [(0, more[0]), (0, 0), (0, more[1]), (0, 0)])) if any(more) else buffer


def _made(array: mx.array) -> mx.array:
    """The array, evaluated, so that the arrays that it was computed from can be freed."""
    mx.eval(array)
    return array


def _scattered(buffer: mx.array, columns: mx.array, new: mx.array) -> mx.array:
    """The buffer with `new` `[S, heads, W, D]` in these columns `[S, W]`."""
    return mx.put_along_axis(buffer, mx.broadcast_to(columns[:, None, :, None], new.shape), new, axis=2)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one layer caches for one token: the number of heads, the widths of keys and values, and the dtype."""

    heads: int
    key_width: int
    value_width: int
    dtype: mx.Dtype

    @property
    def numbers(self) -> int:
        """Bytes per token, as the model computes keys and values."""
        return int(self.heads * (self.key_width + self.value_width) * self.dtype.size)

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token, as the buffers store keys and values."""
        return self.numbers

    @property
    def at_work(self) -> int:
        """Extra bytes per token while columns grow: the larger of the two arrays exists twice."""
        return int(self.heads * max(self.key_width, self.value_width) * self.dtype.size)

    def layer(self, size: Size) -> Layer:
        """Empty buffers for one layer."""
        return self._empty(size, (self.key_width, self.value_width), self.dtype)

    def _empty(self, size: Size, widths: tuple[int, int], dtype: mx.Dtype) -> Layer:
        """A layer of zeros, with these widths of keys and of values."""

        def empty(rows: int, columns: int, width: int) -> mx.array:
            return mx.zeros((rows, self.heads, columns, width), dtype)

        key_width, value_width = widths
        prefix = max(1, size.prefix)
        return Layer(
            empty(size.places, prefix, key_width),
            empty(size.places, prefix, value_width),
            empty(size.slots, size.columns, key_width),
            empty(size.slots, size.columns, value_width),
        )


def cache_shapes(model: nn.Module) -> list[CacheShape] | None:
    """What each layer of a model caches, found by running one token; None unless every cache is a plain `KVCache`."""
    from grpo.model.mlxlm import KVCache, make_prompt_cache

    cache: list[Any] = make_prompt_cache(model)
    if any(type(layer) is not KVCache for layer in cache):
        return None
    model(mx.array([[0]]), cache=cache)
    if any(layer.keys is None for layer in cache):
        return None
    return [CacheShape(k.keys.shape[1], k.keys.shape[3], k.values.shape[3], k.keys.dtype) for k in cache]


def prefill_chunk() -> int:
    """The number of prompt tokens that go through the model in one chunk on this machine."""
    return PREFILL_CHUNK if on_gpu() else min(CPU_CHUNK, PREFILL_CHUNK)


def feed_caches(model: nn.Module, caches: Sequence[Any], rows: mx.array, needed: int | None = None) -> None:
    """Feed tokens `[m, T]` through the model in chunks and append them to mlx-lm's caches.

    Tokens after the first `needed` columns are padding: chunks that hold only padding are skipped.
    """
    chunk = prefill_chunk()
    for start in range(0, rows.shape[1] if needed is None else needed, chunk):
        model(rows[:, start : start + chunk], cache=caches)
        mx.eval([cache.state for cache in caches])  # the logits stay unevaluated
