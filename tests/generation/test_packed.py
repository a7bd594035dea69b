"""Keys and values in 4 or 8 bits: what is kept, how far it is from the model's dtype, and what it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import pytest
from test_growth import conversations, same
from test_wide_steps import both
from ways import LONG, Numbers, asked, exact_buffers, finish, model_of, sliding

from grpo.errors import UserError
from grpo.generation import choice, growth, slots
from grpo.generation.attention import StockAttention
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.blocks import read
from grpo.generation.buffers import CacheShape, KeysValues, Layer, cache_shapes
from grpo.generation.decoders import BlockDecoder, ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.generator import Generator
from grpo.generation.packed import BitPacking, PackedLayer, packed
from grpo.generation.rows import Line, SharedPrompt
from grpo.generation.sampling import Sampling
from grpo.generation.slots import Size, View
from grpo.model.logprobs import KV_ROUNDING


@cache
def model(width: int = 32) -> nn.Module:
    return model_of("qwen3", head_dim=width)


def decoding_of(shapes: Sequence[CacheShape], width: int = 32, blocks: bool = True) -> SharedPrefix:
    decoder = BlockDecoder(read(model(width))) if blocks else ModelDecoder(model(width))
    return SharedPrefix(model(width), decoder, StockAttention(), shapes, 128, "")


def generator_in(bits: int, slots_: int, width: int = 32) -> Generator:
    generator = Generator(model(width), Numbers(), slots_)
    generator.decoding, generator.lanes = decoding_of(packed(cache_shapes(model(width)), bits), width), 1
    return generator


PROMPTS = [[9 + i, *range(20, 20 + 12 * i)] for i in range(4)]
FORCED = mx.array([[(7 * i + 11 * j) % 120 for j in range(40)] for i in range(4)])


def logprobs(decoding: SharedPrefix) -> mx.array:
    """Of each forced token by steps, `[S, T]`."""
    session = decoding.open(Size(4, 4, max(map(len, PROMPTS)) - 1, 40))
    session.admit(range(4), [Line(SharedPrompt(prompt)) for prompt in PROMPTS])
    fed = mx.concatenate([mx.array([[prompt[-1]] for prompt in PROMPTS]), FORCED[:, :-1]], axis=1)
    logits = choice._normalised(choice._steps(session, fed))
    return mx.take_along_axis(logits, FORCED[:, :, None], axis=-1)[..., 0]


class Rounded(Layer):
    """Plain buffers of numbers that have been rounded: what packed ones stand for."""

    bits = 4

    def write(self, view: View, keys: mx.array, values: mx.array) -> None:
        super().write(view, rounded(keys, self.bits), rounded(values, self.bits))

    def insert(self, places: mx.array, prompts: KeysValues, *where: int) -> None:
        super().insert(places, (rounded(prompts[0], self.bits), rounded(prompts[1], self.bits)), *where)


def rounded(array: mx.array, bits: int) -> mx.array:
    """By hand, for one group a head: integers from the end of larger size, whose own value is kept."""
    low, high = array.min(axis=-1, keepdims=True), array.max(axis=-1, keepdims=True)
    scale = mx.maximum((high - low) / (2**bits - 1), 1e-7)
    scale, edge = mx.where(mx.abs(low) > mx.abs(high), scale, -scale), mx.where(mx.abs(low) > mx.abs(high), low, high)
    steps = mx.round(edge / scale)
    scale, bias = mx.where(steps != 0, edge / steps, scale), mx.where(steps == 0, 0, edge)
    return mx.clip(mx.round((array - bias) / scale), 0, 2**bits - 1) * scale + bias


@pytest.mark.each_value
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("width", [32, 64])
def test_it_decodes_as_with_rounded_numbers(bits: int, blocks: bool, width: int, monkeypatch) -> None:
    shapes = cache_shapes(model(width))
    found = logprobs(decoding_of(packed(shapes, bits), width, blocks))
    monkeypatch.setattr(Rounded, "bits", bits)
    plain = CacheShape.layer
    monkeypatch.setattr(CacheShape, "layer", lambda shape, size: Rounded(*plain(shape, size).arrays()))
    gap = mx.abs(logprobs(decoding_of(shapes, width, blocks)) - found)
    assert gap.mean().item() < 1e-5
    assert gap.max().item() < 2e-3  # where a number lies between two integers, sums of another order round it otherwise


@pytest.mark.each_value
@pytest.mark.parametrize(("bits", "least", "most"), [(8, 1e-4, 5e-3), (4, 5e-3, 8e-2)])
@pytest.mark.parametrize("width", [16, 32, 64, 80])
def test_the_gap_is_what_so_many_bits_explain(bits: int, least: float, most: float, width: int) -> None:
    """A number is rounded by 1 / 12^½ of a step, of which a group's range has 2^bits - 1."""
    shapes = cache_shapes(model(width))
    gap = mx.abs(logprobs(decoding_of(packed(shapes, bits), width)) - logprobs(decoding_of(shapes, width))).mean()
    assert least < gap.item() < most
    assert most < KV_ROUNDING[bits]


@pytest.mark.parametrize(("width", "group", "filled"), [(16, 32, 32), (64, 64, 64), (80, 32, 96), (96, 32, 96)])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_width_of_heads_is_packed(bits: int, width: int, group: int, filled: int) -> None:
    packing = BitPacking.of(width, bits)
    assert (packing.group, packing.filled) == (group, filled)
    x, numbers = mx.random.normal((2, 3, 1, width)), mx.random.normal((2, 3, 7, width))
    words, scales, biases = in_bits = packing.packed(numbers)
    assert words.shape == (2, 3, 7, filled * bits // 32)
    assert 2 * 3 * 7 * packing.bytes(mx.float32) == words.nbytes + scales.nbytes + biases.nbytes
    back = packing.numbers(in_bits)
    step = (mx.maximum(numbers.max(-1), 0) - mx.minimum(numbers.min(-1), 0)).max().item() / (2**bits - 1)
    assert (
        mx.abs(back - numbers).max().item() < 1.05 * step
    )  # one end of the range is kept exactly, so the other may lie a step off
    assert mx.allclose(packing.times_transposed(x, in_bits), x @ back.swapaxes(-1, -2), atol=1e-5)
    weights = mx.random.uniform(shape=(2, 3, 1, 7))
    assert mx.allclose(packing.times(weights, in_bits), weights @ back, atol=1e-5)


@pytest.fixture
def small_steps(monkeypatch) -> None:
    monkeypatch.setattr(slots, "width_step", lambda: 8)
    monkeypatch.setattr(growth, "STEP", 8)


@pytest.mark.quick_cases("16")
@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("width", [16, 32])
def test_slots_and_neighbors_change_no_bit(width: int) -> None:
    """Rows that wait, are parked and come back, too: what they keep are the very integers."""
    same(*(conversations(generator_in(4, count, width)) for count in (16, 2)))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("kind", ["right", "some", "wrong"])
def test_wide_steps_change_no_bit(kind: str) -> None:
    submissions = [asked(LONG, n=3, keep=False), asked((9, 10), 2, n=2, keep=False)]
    both(generator_in(4, 4), submissions, kind, [4, 8, 1])


@exact_buffers
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [16, 64])
def test_bytes_are_those_of_the_plan(bits: int, width: int) -> None:
    shapes = packed(cache_shapes(model(width)), bits)
    size = Size(3, 2, 16, 24)
    layers = [shape.layer(size) for shape in shapes]
    held = sum(array.nbytes for layer in layers for array in layer.arrays())
    assert held == (3 * 24 + 2 * 16) * sum(shape.bytes_per_token for shape in shapes)
    assert max(array.nbytes for array in (layers[0].keys, layers[0].values)) == 3 * 24 * shapes[0].at_work
    full = sum(shape.bytes_per_token for shape in cache_shapes(model(64)))
    if width == 64:
        assert held < (3 * 24 + 2 * 16) * full * (bits + 1.01) / 32  # scales and biases of 32 bits, for 64 numbers


def test_what_a_row_keeps_is_as_small() -> None:
    generator = generator_in(4, 2)
    generator.stop_ids = frozenset()
    engine = generator.open()
    (row,) = engine.submit(asked(LONG, n=1, sampling=Sampling(1.0, 60)))
    for _ in range(20):
        engine.step()
    engine.park(row)
    for _ in range(3):
        engine.step()
    assert row.kept.nbytes == generator.decoding.outside(len(LONG), row.kept.fed)
    assert row.kept.nbytes < 0.2 * decoding_of(cache_shapes(model())).outside(len(LONG), row.kept.fed)
    engine.extend(row, [])
    finish(engine)
    assert row.finish_reason is not None


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_chosen_and_said(bits: int) -> None:
    decoding = choice.find_decoding(model(), bits)
    assert decoding.description == f"joined layers, shared prompts, stock operations, keys and values in {bits} bits"
    assert type(decoding.shapes[0].layer(Size(1, 1, 1, 8))) is PackedLayer
    assert Generator(model(), Numbers(), 2, bits).describe()[0].endswith(f"in {bits} bits")


def test_models_of_other_caches_are_refused() -> None:
    said = r"rollout\.kv_bits: .* cannot be quantized: .*more than plain keys and values\. Remove the setting"
    with pytest.raises(UserError, match=said):
        choice.find_decoding(sliding(), 8)
    assert isinstance(choice.find_decoding(sliding()), BatchCaches)


def test_a_wrong_one_is_found_out(monkeypatch) -> None:
    monkeypatch.setattr(BitPacking, "times", lambda self, x, in_bits: 3 * (x @ self.numbers(in_bits)))
    with pytest.raises(UserError, match=r"rollout\.kv_bits: .* its logprobs differ .* \(bound 0\.02\)"):
        choice.find_decoding(model(), 8)


def test_where_products_of_integers_are_not_tried(monkeypatch) -> None:
    """As on CUDA: the numbers are made."""
    decoding = decoding_of(packed(cache_shapes(model()), 4))
    expected = logprobs(decoding)
    monkeypatch.setattr("grpo.generation.packed.available", lambda: True)
    monkeypatch.setattr(mx, "quantized_matmul", None)
    assert mx.allclose(logprobs(decoding), expected, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_row_has_kept_comes_back_to_the_bit(bits: int) -> None:
    """Numbers that are quantised again may come out otherwise."""
    (shape,) = packed([CacheShape(2, 64, 64, mx.bfloat16)], bits)
    layer = shape.layer(Size(2, 1, 1, 32))
    keys, values = (mx.random.normal((1, 2, 24, 64), key=mx.random.key(i)).astype(mx.bfloat16) for i in range(2))
    layer.put(0, (keys, values))
    kept = layer.take(0, 24)
    layer.put_back(1, kept)
    assert all(mx.array_equal(array[0], array[1]) for array in arrays_of(layer))
    layer.put(1, layer.numbers(kept))
    assert not all(mx.array_equal(array[0], array[1]) for array in arrays_of(layer))


def arrays_of(layer: PackedLayer) -> list[mx.array]:
    return [array for part in (layer, layer.scales, layer.biases) for array in (part.keys, part.values)]
