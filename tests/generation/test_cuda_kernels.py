"""The kernels between the products of a layer against stock operations. Needs a CUDA device."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from generation import halves
from mlx_lm.tuner.lora import LoRALinear

from grpo.backend import cuda
from grpo.generation import cuda_products
from grpo.generation.attention import StockAttention
from grpo.generation.blocks import Norm
from grpo.generation.buffers import CacheShape, Layer
from grpo.generation.cuda_attention import CudaAttention
from grpo.generation.cuda_layers import add_and_norm, gated
from grpo.generation.joined import Half, Products
from grpo.generation.slots import Size, Slots

pytestmark = pytest.mark.skipif(not cuda.available(), reason="no CUDA device")

QUERY_HEADS, HEADS = 8, 4
ROUNDING = {mx.float32: 2e-3, mx.float16: 4e-3, mx.bfloat16: 3e-2}
"""Of products in their dtype; float32 products use TF32."""


def drawn(*shape: int, dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    return (scale * mx.random.normal(shape)).astype(dtype)


def half(rows: int, outs: tuple[int, ...], ranks: tuple[int, ...], dtype: mx.Dtype, apart: bool = False) -> Half:
    """A product with A below its matrix, or `apart`; with a bias then."""
    base, low = drawn(rows, sum(outs), dtype=dtype), drawn(rows, max(1, sum(ranks)), dtype=dtype)
    most, pairs = max(1, *ranks), zip(ranks, outs, strict=True)
    b = mx.concatenate(
        [mx.pad(drawn(r, out, dtype=dtype, scale=0.3), [(0, most - r), (0, 0)]) for r, out in pairs], axis=1
    )
    if apart:
        return Half(base, low, 0, b, ranks, drawn(sum(outs), dtype=dtype))
    joined = mx.concatenate([base, low, mx.zeros((rows, -low.shape[1] % 16), dtype)], axis=1)
    return Half(joined, joined, sum(outs), b, ranks, None)


def assert_near(found: mx.array, expected: mx.array) -> None:
    assert found.dtype == expected.dtype
    gap = mx.abs(found.astype(mx.float32) - expected.astype(mx.float32)).max().item()
    assert gap <= ROUNDING[expected.dtype] * mx.abs(expected.astype(mx.float32)).max().item()


@dataclass
class Step:
    """A step of rows of three prompts, which have decoded different numbers of tokens."""

    rows: int
    tokens: int
    width: int
    dtype: mx.Dtype

    def __post_init__(self) -> None:
        size = Size(self.rows, 3, 70, 90)
        self.slots = Slots(size)
        self.slots.step = 80
        rows = range(self.rows)
        lengths = {0: 70, 1: 0, 2: 33}
        self.slots.admit(rows, [r % 3 for r in rows], [lengths[r % 3] for r in rows], [7 * r % 80 for r in rows])
        layer = CacheShape(HEADS, self.width, self.width, self.dtype).layer(size)
        self.layer = Layer(*(drawn(*a.shape, dtype=self.dtype) for a in layer.arrays()))
        norm = Norm([nn.RMSNorm(self.width), nn.RMSNorm(self.width)], [QUERY_HEADS, HEADS])
        norm.held["weight"] = drawn(QUERY_HEADS + HEADS, self.width, dtype=self.dtype)
        self.outs = tuple(heads * self.width for heads in (QUERY_HEADS, HEADS, HEADS))
        self.block: Any = SimpleNamespace(qk_norm=norm, qkv=SimpleNamespace(outs=self.outs))
        frequencies = 10000.0 ** -(mx.arange(self.width // 2) / (self.width // 2))
        self.blocks: Any = SimpleNamespace(
            query_heads=QUERY_HEADS, heads=HEADS, width=self.width, scale=self.width**-0.5, frequencies=frequencies,
            traditional=False, norm=norm,
        )  # fmt: skip


@pytest.mark.parametrize(("dtype", "width"), [(mx.float32, 64), (mx.bfloat16, 32), (mx.bfloat16, 128)])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (11, 1), (200, 1), (5, 2), (7, 8)])
def test_attention_of_several_tokens_a_row_is_stock_attention(dtype, width: int, rows: int, tokens: int) -> None:
    step = Step(rows, tokens, width, dtype)
    qkv = half(rows * tokens, step.outs, (4, 0, 2), dtype, apart=rows == 5)
    own = Layer(*(a + 0 for a in step.layer.arrays()))
    view = step.slots.view(tokens)
    expected = StockAttention().attend_joined(own, qkv.whole(step.outs), step.block, step.blocks, view)
    attention = CudaAttention()
    found = attention.attend_half(step.layer, qkv, step.block, step.blocks, view)
    mx.eval(found, own.arrays())
    assert_near(found, expected)
    assert_near(step.layer.keys, own.keys)
    assert_near(step.layer.values, own.values)
    assert mx.array_equal(attention.attend_half(step.layer, qkv, step.block, step.blocks, view), found)


@pytest.mark.parametrize(("dtype", "width"), [(mx.float32, 64), (mx.bfloat16, 128)])
@pytest.mark.parametrize(("rows", "tokens"), [(11, 1), (5, 2)])
def test_attention_of_queries_that_come_ready_is_stock_attention(dtype, width: int, rows: int, tokens: int) -> None:
    step = Step(rows, tokens, width, dtype)
    queries = drawn(rows, QUERY_HEADS, tokens, width, dtype=dtype)
    keys, values = (drawn(rows, HEADS, tokens, width, dtype=dtype) for _ in range(2))
    own = Layer(*(a + 0 for a in step.layer.arrays()))
    view = step.slots.view(tokens)
    expected = StockAttention().attend(own, queries, keys, values, 0.1, view)
    found = CudaAttention().attend(step.layer, queries, keys, values, 0.1, view)
    mx.eval(found, own.arrays())
    assert_near(found, expected)
    assert_near(step.layer.keys, own.keys)
    assert_near(step.layer.values, own.values)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("rows", "width", "apart"), [(3, 64, False), (300, 1032, False), (5, 30, True)])
def test_sums_and_gates_are_those_of_stock_operations(dtype, rows: int, width: int, apart: bool) -> None:
    hidden, norm = drawn(rows, width, dtype=dtype), Norm([nn.RMSNorm(width)])
    norm.held["weight"] = drawn(width, dtype=dtype)
    out = half(rows, (width,), (5,), dtype, apart)
    for found, expected in zip(add_and_norm(hidden, out, norm), halves.add_and_norm(hidden, out, norm), strict=True):
        assert_near(found, expected)
    both = half(rows, (width, width), (3, 6), dtype, apart)
    assert_near(gated(both, width), halves.gated(both, width))


def test_adapters_are_written_below_the_matrix_in_its_place() -> None:
    layers = [LoRALinear.from_base(nn.Linear(64, outs, bias=False), r=4, scale=2.0) for outs in (32, 48)]
    products = Products(layers)
    products.halve()
    products.refresh(mx.float32)
    matrix = products.joined["weight"]
    for layer in layers:
        layer.lora_a, layer.lora_b = mx.random.normal((64, 4)), mx.random.normal(layer.lora_b.shape)
    assert not products.refresh(mx.float32)
    assert products.joined["weight"] is matrix
    x = mx.random.normal((5, 64))
    assert_near(products(x), mx.concatenate([layer(x) for layer in layers], axis=-1))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("rows", "width", "outs"), [(1, 64, 20), (8, 1024, 1040), (33, 96, 4112), (64, 3072, 1040)])
def test_products_of_few_rows_are_those_of_stock_operations(dtype, rows: int, width: int, outs: int) -> None:
    x, matrix = drawn(rows, width, dtype=dtype), drawn(outs, width, dtype=dtype)
    assert cuda_products.serves(x, matrix)
    assert_near(cuda_products.product(x, matrix), x @ matrix.T)


def test_a_rows_product_does_not_depend_on_the_rows_beside_it() -> None:
    x, matrix = drawn(64, 1024, dtype=mx.bfloat16), drawn(4112, 1024, dtype=mx.bfloat16)
    together = cuda_products.product(x, matrix)
    for rows in (1, 8, 17, 32):
        assert mx.array_equal(cuda_products.product(x[:rows], matrix), together[:rows])


def test_products_of_many_rows_or_in_float32_are_left_to_stock_operations() -> None:
    x, matrix = mx.zeros((64, 64), mx.bfloat16), mx.zeros((8, 64), mx.bfloat16)
    assert cuda_products.serves(x, matrix)
    assert not cuda_products.serves(mx.zeros((65, 64), mx.bfloat16), matrix)
    assert not cuda_products.serves(x.astype(mx.float32), matrix.astype(mx.float32))
    assert not cuda_products.serves(x[:, :48], matrix[:, :48])
