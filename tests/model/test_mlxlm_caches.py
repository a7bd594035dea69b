"""What grpo relies on in mlx-lm's caches and in its attention, held by what they do to toy models."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.small import COMMON as LARGER
from architectures.small import SMALL
from conftest import make_model
from contract import holds

from grpo.model import mlxlm

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
NEXT = [20, 21]


def recurrent() -> nn.Module:
    mx.random.seed(0)
    return mlxlm.new_model({**LARGER, **SMALL["Qwen3-Next"]})


@holds("make_prompt_cache", "KVCache", "RotatingKVCache", "ArraysCache")
def test_each_layer_has_the_kind_of_cache_that_is_known() -> None:
    def kinds(model: nn.Module) -> list[str]:
        return [type(cache).__name__ for cache in mlxlm.make_prompt_cache(model)]

    assert {type(cache) for cache in mlxlm.make_prompt_cache(make_model("tied"))} == {mlxlm.KVCache}
    windows = mlxlm.make_prompt_cache(make_model("gemma3_text"))
    assert {type(cache) for cache in windows} == {mlxlm.KVCache, mlxlm.RotatingKVCache}
    assert len(windows) == 3
    assert kinds(recurrent()) == ["ArraysCache", "KVCache"]


@holds("KVCache")
def test_keys_and_values_are_kept_in_blocks_of_256_columns() -> None:
    cache, keys, values = mlxlm.KVCache(), mx.random.normal((2, 3, 5, 4)), mx.random.normal((2, 3, 5, 6))
    assert (cache.keys, cache.offset, cache.nbytes) == (None, 0, 0)
    seen = cache.update_and_fetch(keys, values)
    assert (mx.array_equal(seen[0], keys), mx.array_equal(seen[1], values), cache.offset) == (True, True, 5)
    more = mx.random.normal((2, 3, 1, 4)), mx.random.normal((2, 3, 1, 6))
    seen = cache.update_and_fetch(*more)
    assert mx.array_equal(seen[0], mx.concatenate([keys, more[0]], axis=2))
    assert (cache.keys.shape, cache.values.shape, cache.offset) == ((2, 3, 256, 4), (2, 3, 256, 6), 6)
    assert cache.nbytes == 4 * 2 * 3 * 256 * (4 + 6)
    mx.eval(cache.state)
    assert mx.array_equal(cache.keys[:, :, 5:6], more[0])


@holds("ArraysCache", "CacheList")
def test_a_recurrent_layer_s_arrays_are_read_and_written_by_number() -> None:
    cache = mlxlm.ArraysCache(2)
    assert cache[0] is None
    cache[0] = mx.ones((1, 3))
    assert cache[0].shape == (1, 3)
    several = mlxlm.CacheList(cache, mlxlm.KVCache())
    assert several.caches[0] is cache
    assert len(several.caches) == 2


@holds("make_prompt_cache", "KVCache", "RotatingKVCache")
@pytest.mark.parametrize("kind", ["tied", "gemma3_text"])
def test_batch_caches_pad_extend_filter_and_extract_without_a_trace(kind: str) -> None:
    """generation/caches: rows together are what each is alone, after all that is done to a batch."""
    model = make_model(kind)
    alone = [model(mx.array([[*ids, token]]))[0, -1] for ids, token in zip(PROMPTS, NEXT, strict=True)]
    lengths, width = [len(ids) for ids in PROMPTS], max(map(len, PROMPTS))
    padding = [width - length for length in lengths]
    layers = [mlxlm.make_prompt_cache(model) for _ in PROMPTS]
    caches = [type(of_layer[0]).merge(list(of_layer)) for of_layer in zip(*layers, strict=True)]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=padding)
    model(mx.array([[*ids, *[0] * pad] for ids, pad in zip(PROMPTS, padding, strict=True)]), cache=caches)
    mx.eval([cache.state for cache in caches])
    for cache in caches:
        cache.finalize()
    rows = [[cache.extract(row) for cache in caches] for row in (0, 1)]
    merged = [type(of_layer[0]).merge(list(of_layer)) for of_layer in zip(rows[1], strict=True)]
    for cache, other in zip(merged, caches, strict=True):
        cache.extend(other)  # rows 1, 0, 1
        cache.filter([0, 1])
    together = model(mx.array([[NEXT[1]], [NEXT[0]]]), cache=merged)[:, -1]
    assert mx.allclose(together, mx.stack(alone[::-1]), atol=1e-4)


@holds("make_prompt_cache", "ArraysCache")
def test_a_recurrent_model_goes_on_from_its_caches_as_from_its_prompt() -> None:
    model = recurrent()
    whole = model(mx.array([[*PROMPTS[1], NEXT[0]]]))[0, -1]
    cache = mlxlm.make_prompt_cache(model)
    model(mx.array([PROMPTS[1]]), cache=cache)
    rows = [[layer.extract(0) for layer in [type(layer).merge([layer, layer]) for layer in cache]] for _ in range(2)]
    batch = [type(of_layer[0]).merge(list(of_layer)) for of_layer in zip(*rows, strict=True)]
    out = model(mx.array([[NEXT[0]], [NEXT[0]]]), cache=batch)[:, -1]
    assert mx.allclose(out, mx.stack([whole, whole]), atol=1e-4)


@holds("make_prompt_cache", "KVCache")
def test_rows_of_several_lengths_take_more_tokens_in_one_batch() -> None:
    """generation/caches: rows that hold something already, padded on the right, are what each is by itself."""
    model = make_model("tied")
    kept = [mlxlm.make_prompt_cache(model) for _ in PROMPTS]
    for caches, ids in zip(kept, PROMPTS, strict=True):
        model(mx.array([ids]), cache=caches)
    batch = [type(of_layer[0]).merge(list(of_layer)) for of_layer in zip(*kept, strict=True)]
    more = [[20, 21, 22, 23], [24]]
    for cache in batch:
        cache.prepare(lengths=[4, 1], right_padding=[0, 3])
    model(mx.array([ids + [0] * (4 - len(ids)) for ids in more]), cache=batch)
    for cache in batch:
        cache.finalize()
    for row, (caches, ids) in enumerate(zip(kept, more, strict=True)):
        model(mx.array([ids]), cache=caches)
        for alone, together in zip(caches, [cache.extract(row) for cache in batch], strict=True):
            assert (together.offset, together.size()) == (alone.offset, alone.size())
            for one, other in zip(alone.keys_and_values(), together.keys_and_values(), strict=True):
                assert mx.allclose(one, other, atol=1e-5)


@holds("KVCache")
def test_a_cache_filled_by_its_fields_is_one_that_was_fed() -> None:
    """generation/caches: keys and values that were taken out of a slot go on in a cache."""
    model = make_model("tied")
    fed = mlxlm.make_prompt_cache(model)
    model(mx.array([PROMPTS[1]]), cache=fed)
    filled = mlxlm.make_prompt_cache(model)
    for cache, other in zip(filled, fed, strict=True):
        cache.keys, cache.values = other.keys_and_values()
        cache.offset = cache.keys.shape[2]
    assert mx.allclose(model(mx.array([NEXT]), cache=filled), model(mx.array([NEXT]), cache=fed), atol=1e-5)


@holds("create_causal_mask")
def test_a_causal_mask_by_hand() -> None:
    assert mlxlm.create_causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    window = [[True, False, False], [True, True, False], [False, True, True]]
    assert mlxlm.create_causal_mask(3, window_size=2).tolist() == window


class Recorder:
    """The least that a layer asks of a cache: what generation/decoders and model/promptcaches put in its place."""

    def __init__(self) -> None:
        self.offset = mx.array([0])
        self.asked: list[tuple[int, bool, int | None]] = []

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> str:
        self.asked.append((n, return_array, window_size))
        return "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


@holds("scaled_dot_product_attention")
@pytest.mark.parametrize("kind", ["tied", "llama", "moe", "cohere", "granite"])
def test_attention_is_one_function_that_each_file_calls_by_its_name(kind: str, monkeypatch) -> None:
    model, calls, name = make_model(kind), [], "scaled_dot_product_attention"
    file = sys.modules[type(model).__module__]
    assert getattr(file, name) is mlxlm.scaled_dot_product_attention
    expected = model(mx.array([PROMPTS[0]]))

    def attend(queries, keys, values, cache, scale, mask, **others):
        calls.append((queries.shape[1], keys.shape[1], mask, others))
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    monkeypatch.setattr(file, name, attend)
    caches = [Recorder() for _ in model.layers]
    assert mx.allclose(model(mx.array([PROMPTS[0]]), cache=caches), expected, atol=1e-5)  # positions `[B]`, too
    assert len(calls) == len(model.layers)
    assert all(heads == 4 and mask == "causal" and not any(others.values()) for heads, _, mask, others in calls)
    assert {asked for cache in caches for asked in cache.asked} <= {(3, False, None)}


@holds("swiglu")
@pytest.mark.parametrize("kind", ["tied", "llama", "moe", "cohere", "granite"])
def test_a_gated_layer_s_activation_is_one_function_that_each_file_calls_by_its_name(kind: str, monkeypatch) -> None:
    model, calls = make_model(kind), []
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    calling = [file for file in files if hasattr(file, "swiglu")]
    assert all(file.swiglu is mlxlm.swiglu for file in calling)

    def gated(gate: mx.array, x: mx.array) -> mx.array:
        calls.append(gate.shape == x.shape)
        return nn.silu(gate) * x

    expected = model(mx.array([PROMPTS[0]]))
    for file in calling:
        monkeypatch.setattr(file, "swiglu", gated)
    assert mx.allclose(model(mx.array([PROMPTS[0]])), expected, atol=1e-5)
    assert calls == [True] * len(model.layers)
