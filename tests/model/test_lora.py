"""The LoRA layer in fewer passes computes what mlx-lm's own does, and its gradients."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from grpo.config import AdapterConfig
from grpo.model.adapters import Adapters
from grpo.model.dora import FoldedDoRALinear, fold_magnitudes
from grpo.model.lora import FoldedLoRALinear, fold

INPUTS, OUTPUTS = 64, 96


def layer(base: str, bias: bool, dtype: mx.Dtype, kind: type[nn.Module] = LoRALinear) -> nn.Module:
    keys = iter(mx.random.split(mx.random.key(0), 4))
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    linear.update(tree_map(lambda a: mx.random.normal(a.shape, dtype, key=next(keys)), linear.parameters()))
    whole = linear if base == "dense" else linear.to_quantized(mode=base)
    made = kind.from_base(whole, r=4, scale=2.5)
    made.linear.freeze()
    made.lora_a = mx.random.normal((INPUTS, 4), dtype, key=next(keys))
    made.lora_b = mx.random.normal((4, OUTPUTS), dtype, key=next(keys))
    return made


def computed(layer: nn.Module, x: mx.array) -> list[mx.array]:
    """Its output, and the gradients to A, B and the input of that output times other numbers."""
    weights = mx.random.normal((*x.shape[:-1], OUTPUTS), x.dtype, key=mx.random.key(1))

    def loss(trained: dict, x: mx.array) -> mx.array:
        layer.update(trained)
        return (layer(x) * weights).astype(mx.float32).sum()

    trained = layer.trainable_parameters()
    to_trained, to_input = mx.grad(loss, argnums=(0, 1))(trained, x)
    layer.update(trained)
    return [layer(x), *(array for _, array in tree_flatten(to_trained)), to_input]


@pytest.mark.parametrize("base", ["dense", "affine", "mxfp4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("shape", [(INPUTS,), (5, INPUTS), (2, 3, INPUTS)])
def test_output_and_gradients_are_those_of_mlx_lm(base: str, bias: bool, dtype: mx.Dtype, shape: tuple) -> None:
    x = mx.random.normal(shape, dtype, key=mx.random.key(2))
    made = layer(base, bias, dtype)
    theirs = computed(made, x)
    fold(made)
    assert type(made) is FoldedLoRALinear
    bound = 1e-5 if dtype == mx.float32 else 0.02  # a few roundings
    for one, other in zip(computed(made, x), theirs, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert mx.linalg.norm((one - other).astype(mx.float32)) < bound * mx.linalg.norm(other.astype(mx.float32))


@pytest.mark.parametrize("base", ["dense", "affine", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("shape", [(INPUTS,), (2, 3, INPUTS)])
def test_magnitudes_without_the_whole_matrix_are_those_of_mlx_lm(base: str, bias: bool, dtype, shape: tuple) -> None:
    x = mx.random.normal(shape, dtype, key=mx.random.key(2))
    made = layer(base, bias, dtype, DoRALinear)
    whole = nn.Linear(INPUTS, OUTPUTS, bias=bias)  # what mlx-lm makes of it at every call, here in float32
    whole.weight = made._dequantized_weight().astype(mx.float32)
    if bias:
        whole.bias = made.linear.bias.astype(mx.float32)
    theirs = DoRALinear.from_base(whole, r=4, scale=2.5)
    theirs.linear.freeze()
    theirs.lora_a, theirs.lora_b = (array.astype(mx.float32) for array in (made.lora_a, made.lora_b))
    fold_magnitudes(made)
    assert type(made) is FoldedDoRALinear
    made.m = theirs.m = made.m * mx.linspace(0.5, 1.5, OUTPUTS)  # as training moves them
    bound = 1e-5 if dtype == mx.float32 else 0.02
    for one, other in zip(computed(made, x), computed(theirs, x.astype(mx.float32)), strict=True):
        assert one.shape == other.shape
        assert mx.linalg.norm((one - other).astype(mx.float32)) < bound * mx.linalg.norm(other)


def test_no_rows_are_no_mistake() -> None:
    made = layer("dense", False, mx.float32)
    fold(made)
    assert made(mx.zeros((2, 0, INPUTS))).shape == (2, 0, OUTPUTS)


def test_other_layers_stay_what_they_are(zoo) -> None:
    block = nn.Module()
    block.odd = [DoRALinear.from_base(nn.Linear(8, 8)), LoRAEmbedding.from_base(nn.Embedding(8, 8))]
    block.even = LoRALinear.from_base(nn.Linear(8, 8))
    fold(block)
    assert [type(module) for module in (*block.odd, block.even)] == [DoRALinear, LoRAEmbedding, FoldedLoRALinear]
    model = zoo("moe")
    Adapters(model, AdapterConfig(rank=2), mx.random.key(0))
    kinds = {type(module) for module in model.modules()}
    assert {FoldedLoRALinear, LoRASwitchLinear} <= kinds
    assert LoRALinear not in kinds
