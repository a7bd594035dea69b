"""mlx-lm's caches for single rows, and joined to batch caches for several rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.generation.buffers import PREFILL_TOKENS, KeysValues, feed_caches

Caches = list[Any]
"""One mlx-lm cache per layer."""


def is_recurrent(cache: Any) -> bool:
    """Whether a cache holds a recurrent state, which padding would change: not every model masks padding."""
    from grpo.model.mlxlm import ArraysCache, CacheList

    if isinstance(cache, CacheList):
        return any(map(is_recurrent, cache.caches))
    return isinstance(cache, ArraysCache)


def copy_states(cache: Any) -> None:
    """Copy a row's recurrent states, which are views of the batch's states, so that the batch can be freed."""
    from grpo.model.mlxlm import ArraysCache, CacheList

    for inner in cache.caches if isinstance(cache, CacheList) else ():
        copy_states(inner)
    if isinstance(cache, ArraysCache):
        cache.cache = [None if state is None else state[mx.array([0])] for state in cache.cache]


def is_plain(cache: Any) -> bool:
    """Whether a cache holds only keys and values."""
    from grpo.model.mlxlm import KVCache

    return type(cache) is KVCache


def empty(model: nn.Module) -> Caches:
    """Empty caches for one row."""
    from grpo.model.mlxlm import make_prompt_cache

    caches: Caches = make_prompt_cache(model)
    return caches


def filled(model: nn.Module, held: Sequence[KeysValues]) -> Caches:
    """Plain caches of one row with these keys and values `[1, heads, n, D]`, one pair per layer."""
    caches = empty(model)
    for cache, (keys, values) in zip(caches, held, strict=True):
        if keys.shape[2]:
            cache.keys, cache.values, cache.offset = keys, values, keys.shape[2]
    return caches


def merged(rows: Sequence[Caches]) -> Caches:
    """Merge the caches of single rows into batch caches."""
    return [type(layers[0]).merge(list(layers)) for layers in zip(*rows, strict=True)]


def prefilled(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Caches:
    """Batch caches with the keys and values of prompts, without their last tokens."""
    caches = merged([empty(model) for _ in prompts])
    feed_padded(model, caches, [ids[:-1] for ids in prompts])
    return caches


def feed_padded(model: nn.Module, caches: Caches, rows: Sequence[Sequence[int]]) -> None:
    """Feed rows through the model and append them to batch caches. Right padding is announced to mlx-lm's caches."""
    lengths = [len(ids) for ids in rows]
    width = max(lengths)
    padding = [width - length for length in lengths]
    for cache in caches if max(padding) else ():
        cache.prepare(lengths=lengths, right_padding=padding)
    feed_caches(model, caches, mx.array([[*ids, *[0] * (width - len(ids))] for ids in rows]))
    for cache in caches if max(padding) else ():
        cache.finalize()


def extended(
    model: nn.Module, rows: Sequence[Caches], token_ids: Sequence[Sequence[int]], together: bool
) -> list[Caches]:
    """The caches of single rows after feeding each row more tokens; a row may have no new tokens.

    `together`: rows may go through the model in one batch. A cache that is fed alone is changed in place.
    """
    found = list(rows)
    longer = sorted((i for i, ids in enumerate(token_ids) if ids), key=lambda i: len(token_ids[i]))
    while longer:
        width = len(token_ids[longer[-1]]) + max(rows[i][0].size() for i in longer)
        at_once = max(1, PREFILL_TOKENS // width) if together else 1
        part, longer = longer[-at_once:], longer[:-at_once]
        if len(part) == 1:
            feed_caches(model, found[part[0]], mx.array([list(token_ids[part[0]])]))
            continue
        batch = merged([rows[i] for i in part])
        feed_padded(model, batch, [token_ids[i] for i in part])
        for row, i in enumerate(part):
            found[i] = [cache.extract(row) for cache in batch]
    return found


def extends_together(model: nn.Module, bound: float) -> bool:
    """Whether rows of different lengths may be extended in one batch: not every model masks the padding.

    Extends rows in one batch and one by one, and compares the mean difference of their keys, relative to the mean size
    of the keys, with the bound.
    """
    prompts, more = [[1, 2, 3, 4, 5], [6, 7]], [[8, 9], [10, 11, 12, 13]]
    alone, batch = (
        extended(model, extended(model, [empty(model) for _ in prompts], prompts, False), more, together)
        for together in (False, True)
    )
    gaps, sizes = [], []
    for one, other in zip(alone, batch, strict=True):
        expected, found = one[-1].keys_and_values()[0], other[-1].keys_and_values()[0]
        gaps.append(mx.abs(expected - found).mean())
        sizes.append(mx.abs(expected).mean())
    return bool((mx.stack(gaps).sum() <= bound * mx.stack(sizes).sum()).item())
