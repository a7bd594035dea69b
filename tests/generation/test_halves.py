"""Products whose adapters are applied by half, and a layer's kernels around them, against the modules."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from generation.halves import StockKernels, stock_kernels
from generation.ways import VOCABULARY, model_of
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from grpo.generation.blocks import read
from grpo.generation.buffers import cache_shapes
from grpo.generation.choice import _fault, _teacher_forced
from grpo.generation.decoders import BlockDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.joined import MOST_RANKS, Products

RANKS = [(4, 4), (0, 0), (0, 3), (5, 0), (2, 9)]


def linear(outs: int, rank: int, bias: bool = False, quantised: bool = False) -> nn.Module:
    layer: nn.Module = nn.Linear(64, outs, bias=bias)
    if quantised:
        layer = nn.QuantizedLinear.from_linear(layer, group_size=32)
    if rank:
        layer = LoRALinear.from_base(layer, r=rank, scale=2.0)
        layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape)
    return layer


def halved(layers: list[nn.Module]) -> Products:
    products = Products(layers)
    products.halve()
    assert products.refresh(mx.float32)
    return products


def assert_modules(products: Products, layers: list[nn.Module]) -> None:
    x = mx.random.normal((5, 64))
    expected = mx.concatenate([layer(x) for layer in layers], axis=-1)
    assert mx.allclose(products.half(x).whole(products.outs), expected, atol=1e-5)
    assert mx.allclose(products(x, onto=expected), 2 * expected, atol=2e-5)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", [{}, {"bias": True}, {"quantised": True}])
def test_halves_with_b_are_the_modules(ranks: tuple[int, int], kind: dict[str, bool]) -> None:
    layers = [linear(32, ranks[0], **kind), linear(48, ranks[1], **kind)]
    products = halved(layers)
    assert_modules(products, layers)
    low = products.half(mx.zeros((1, 64)))
    assert low.ranks == ranks
    assert low.first == (80 if any(ranks) and "quantised" not in kind else 0)


def test_adapters_are_taken_over_where_they_lie() -> None:
    layers = [linear(32, 4), linear(48, 4)]
    products = halved(layers)
    layers[1].lora_a = layers[1].lora_a + 1.0
    layers[0].lora_b = layers[0].lora_b * 2
    assert not products.refresh(mx.float32)  # adapters alone
    assert_modules(products, layers)
    layers[0].linear.weight = layers[0].linear.weight * 2
    assert products.refresh(mx.float32)  # A lies below the new matrix as well
    assert_modules(products, layers)


def test_adapters_of_more_ranks_than_kernels_take_are_products() -> None:
    layers = [linear(32, MOST_RANKS + 1), linear(48, 2)]
    products = halved(layers)
    assert products.half(mx.zeros((1, 64))).ranks == (0, 0)
    assert_modules(products, layers)


def test_the_base_is_held_once() -> None:
    layers = [linear(32, 4), linear(48, 4)]
    products = halved(layers)
    mx.eval([layer.linear.weight for layer in layers], products.joined)
    assert products.joined["weight"].shape == (32 + 48 + 16, 64)
    layers[0].linear.weight[0] = 0  # a copy on writing: the views are views no more only for who writes
    assert mx.array_equal(products.joined["weight"][32:80], layers[1].linear.weight)


def adapted(architecture: str, **changes: object) -> nn.Module:
    model = model_of(architecture, **changes)
    norms = {
        path: 1 + 0.3 * mx.random.normal(a.shape) for path, a in tree_flatten(model.parameters()) if "norm" in path
    }
    model.update(tree_unflatten(list(norms.items())))
    for number, layer in enumerate(model.layers):
        for part, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "up_proj")):
            if number or name != "o_proj":
                wrapped = LoRALinear.from_base(getattr(part, name), r=4, scale=2.0)
                wrapped.lora_b = 0.3 * mx.random.normal(wrapped.lora_b.shape)
                setattr(part, name, wrapped)
    return model


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_a_step_by_eight_kernels_a_layer_is_the_stock_step(architecture: str) -> None:
    model = adapted(architecture)
    shapes = cache_shapes(model)
    assert shapes
    with stock_kernels():
        kernels = BlockDecoder(read(model))
        decoding = SharedPrefix(model, kernels, StockKernels(), shapes, VOCABULARY, "")
        assert _fault(decoding, *_teacher_forced(model, VOCABULARY)) is None
