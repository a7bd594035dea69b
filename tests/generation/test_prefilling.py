"""Prompts go into their places chunk by chunk: right in every way of keeping them, and held once."""

from __future__ import annotations

import mlx.core as mx
import pytest
from ways import exact_buffers, model_of

from grpo.generation import buffers, prefilling
from grpo.generation.buffers import KeysValues, Layer, cache_shapes
from grpo.generation.packed import packed
from grpo.generation.prefilling import PlaceCache, prefill
from grpo.generation.slots import Size
from grpo.model import attention as attending_in_tiles
from grpo.model.mlxlm import make_prompt_cache
from grpo.model.sight import MASKED

PROMPTS = [[9, 10, 11, 12], [7 * i % 120 for i in range(41)], [5]]
LENGTHS = [len(prompt) - 1 for prompt in PROMPTS]


on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU has MLX's fused attention")


def filled(prompts: list[list[int]], places: list[int], bits: int | None = None) -> list[Layer]:
    model = model_of("qwen3", head_dim=32)
    shapes = packed(cache_shapes(model), bits) if bits else cache_shapes(model)
    layers = [shape.layer(Size(1, 4, max(40, *map(len, prompts)), 8)) for shape in shapes]
    prefill(model, prompts, layers, places)
    return layers


def expected(prompt: list[int]) -> list[KeysValues]:
    """What mlx-lm's own caches hold, of one pass."""
    model = model_of("qwen3", head_dim=32)
    caches = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=caches)
    return [cache.keys_and_values() for cache in caches]


@pytest.mark.parametrize("chunk", [2048, 16, 5])
def test_each_place_has_its_prompt(monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", chunk)
    layers = filled(PROMPTS, [2, 0, 3])
    for place, prompt, length in ((2, PROMPTS[0], 3), (0, PROMPTS[1], 40)):
        for layer, (keys, values) in zip(layers, expected(prompt), strict=True):
            found = layer.prompt(place, length)
            assert mx.allclose(found[0], keys, atol=1e-5)
            assert mx.allclose(found[1], values, atol=1e-5)
    assert not any(layer.prefix_keys[1].any().item() for layer in layers)  # nobody's place


@pytest.mark.parametrize("bits", [4, 8])
def test_a_chunk_sees_its_own_as_computed_and_the_earlier_as_kept(monkeypatch, bits: int) -> None:
    whole = filled(PROMPTS, [0, 1, 2], bits)
    for layer, (keys, _) in zip(whole, expected(PROMPTS[1]), strict=True):
        gap = mx.abs(layer.prompt(1, 40)[0] - layer.of_keys.numbers(layer.of_keys.packed(keys)))
        assert (gap < 1e-5).mean().item() > 0.99  # a number may be rounded to its other neighbor
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", 16)
    parts = filled(PROMPTS, [0, 1, 2], bits)
    first, last = (
        mx.abs(a.prompt(1, 40)[0] - b.prompt(1, 40)[0]) for a, b in ((whole[0], parts[0]), (whole[1], parts[1]))
    )
    assert first.max().item() < 1e-4  # of the first layer nothing depends on what others keep
    assert last[:, :, :16].max().item() < 1e-4
    assert last[:, :, 16:].max().item() > 1e-4


@exact_buffers
@pytest.mark.parametrize("bits", [None, 4])
def test_a_long_prompt_is_held_once(monkeypatch, bits: int | None) -> None:
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", 64)
    model = model_of("qwen3", head_dim=64, num_hidden_layers=16)
    shapes = packed(cache_shapes(model), bits) if bits else cache_shapes(model)
    prompt = [7 * i % 120 for i in range(1025)]
    layers = [shape.layer(Size(1, 1, 1024, 8)) for shape in shapes]
    mx.eval([layer.arrays() for layer in layers])
    once = 1024 * sum(shape.bytes_per_token for shape in shapes)
    numbers = 1024 * sum(shape.numbers for shape in shapes)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    prefill(model, [prompt], layers, [0])
    peak = mx.get_peak_memory() - before
    assert once > numbers / 8
    assert peak < numbers / 2  # beside the places: some layers' at work, and a chunk's scores


@pytest.mark.parametrize("length", [17, 33, 39])
def test_company_changes_no_bit_of_a_prompt(monkeypatch, length: int) -> None:
    """The last chunk is short, and a product of fewer than four rows rounds otherwise."""
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", 32)
    prompt, other = [7 * i % 120 for i in range(length + 1)], [11 * i % 120 for i in range(length + 1)]
    alone, beside = filled([prompt], [1]), filled([prompt, other, other, other], [1, 0, 2, 3])
    for one, two in zip(alone, beside, strict=True):
        assert mx.array_equal(one.prompt(1, length)[0], two.prompt(1, length)[0])
        assert mx.array_equal(one.prompt(1, length)[1], two.prompt(1, length)[1])


@on_cpu
@pytest.mark.parametrize("length", [24, 65, 127, 200, 257])
def test_longer_company_changes_no_bit_of_a_prompt(length: int) -> None:
    """All tiles are as wide as they are alone, or only zeros wider."""
    prompt, other = [7 * i % 120 for i in range(length + 1)], [11 * i % 120 for i in range(400)]
    alone, beside = filled([prompt], [1]), filled([prompt, other], [1, 0])
    for one, two in zip(alone, beside, strict=True):
        assert mx.array_equal(one.prompt(1, length)[0], two.prompt(1, length)[0])
        assert mx.array_equal(one.prompt(1, length)[1], two.prompt(1, length)[1])


@on_cpu
def test_company_changes_no_bit_where_training_would_keep_the_scores_of_few_rows(monkeypatch) -> None:
    monkeypatch.setattr(attending_in_tiles, "KEPT", 4 * 128 * 128)  # of one prompt, not of two
    prompt, other = [7 * i % 120 for i in range(129)], [11 * i % 120 for i in range(129)]
    kept = list[bool]()
    tiling = attending_in_tiles.Tiling.of
    monkeypatch.setattr(attending_in_tiles.Tiling, "of", lambda *given: kept.append(given[-1]) or tiling(*given))
    alone, beside = filled([prompt], [1]), filled([prompt, other], [1, 0])
    for one, two in zip(alone, beside, strict=True):
        assert mx.array_equal(one.prompt(1, 128)[0], two.prompt(1, 128)[0])
        assert mx.array_equal(one.prompt(1, 128)[1], two.prompt(1, 128)[1])
    assert set(kept) == {False}


@on_cpu
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_cpu_attends_in_tiles(monkeypatch, architecture: str) -> None:
    chunks = list[tuple[int, bool]]()

    def counted(queries: mx.array, *given: object, **settings: object) -> mx.array:
        chunks.append((queries.shape[2], given[4] is not None))  # with prompts before them
        return attention(queries, *given, **settings)

    attention = prefilling.attention
    monkeypatch.setattr(prefilling, "attention", counted)
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", 32)
    model = model_of(architecture)
    layers = [shape.layer(Size(1, 1, 40, 8)) for shape in cache_shapes(model)]
    prefill(model, [PROMPTS[1]], layers, [0])
    assert chunks == [(32, False)] * len(layers) + [(24, True)] * len(layers)


def attended(given: str) -> tuple[mx.array, mx.array]:
    """The second chunk's attention, of 30 tokens behind 34, and what it should be by the definition."""
    layer = cache_shapes(model_of("qwen3", head_dim=32))[0].layer(Size(1, 2, 64, 8))
    heads, places = layer.prefix_keys.shape[1], mx.array([1, 0])
    queries, keys, values = (mx.random.normal((2, heads, 64, 32), key=mx.random.key(i)) for i in range(3))
    cache = PlaceCache(layer, places)
    cache.update_and_fetch(keys[:, :, :34], values[:, :, :34])
    seen = cache.update_and_fetch(keys[:, :, 34:], values[:, :, 34:])
    sees = mx.tri(64, 64, 0)[34:] > 0
    if given == "other keys":
        keys = keys * 2
        seen = keys, seen[1]
    if given == "other values":
        values = values * 2
        seen = seen[0], values
    if given == "window":
        sees = sees & (mx.tri(64, 64, -9)[34:] == 0)
    if given == "everything":
        sees = mx.ones_like(sees)
    mask = {"window": sees, "everything": None}.get(given, "causal")
    sinks = mx.arange(1.0, heads + 1) if given == "sinks" else None
    found = cache.attend(queries[:, :, 34:], *seen, 0.2, mask, sinks)
    scores = queries[:, :, 34:] @ keys.swapaxes(-1, -2) * 0.2 + mx.where(sees, 0.0, MASKED)
    if sinks is not None:
        column = mx.broadcast_to(sinks[:, None, None], (2, heads, 30, 1))
        return found, mx.softmax(mx.concatenate([scores, column], axis=-1), axis=-1)[..., :-1] @ values
    return found, mx.softmax(scores, axis=-1) @ values


@pytest.mark.parametrize("given", ["causal", "window", "other keys", "other values", "everything", "sinks"])
def test_a_chunk_attends_over_what_the_model_gives_it(given: str) -> None:
    found, expected = attended(given)
    assert mx.allclose(found, expected, atol=1e-5)


@exact_buffers
def test_a_cpu_holds_the_scores_of_few_tokens() -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU takes more of them at once")
    model = model_of("qwen3")
    layers = [shape.layer(Size(1, 1, 1024, 8)) for shape in cache_shapes(model)]
    mx.eval([layer.arrays() for layer in layers])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    prefill(model, [[7 * i % 120 for i in range(1025)]], layers, [0])
    scores = 4 * 256 * 1024 * 4  # of four heads in fp32
    assert mx.get_peak_memory() - before < 2 * scores
