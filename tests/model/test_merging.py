from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear

from grpo.model.dora import fold_magnitudes
from grpo.model.merging import merge


def adapted(quantized: bool) -> nn.Module:
    """A bfloat16 model of one layer, with a DoRA adapter that has learned something."""
    mx.random.seed(0)
    layer, model = nn.Linear(128, 64), nn.Module()
    layer.set_dtype(mx.bfloat16)
    model.norm = nn.RMSNorm(128)
    model.norm.set_dtype(mx.bfloat16)
    model.layer = DoRALinear.from_base(layer.to_quantized(64, 8) if quantized else layer, r=4, scale=2.0)
    model.layer.lora_b = mx.random.normal(model.layer.lora_b.shape) * 0.1
    fold_magnitudes(model)
    return model


@pytest.mark.parametrize("quantized", [False, True])
def test_a_merged_dora_layer_keeps_the_models_dtype(quantized: bool) -> None:
    merged = merge(adapted(quantized)).layer
    dtypes = {path: array.dtype for path, array in tree_flatten(merged.parameters())}
    assert dtypes.pop("weight") == (mx.uint32 if quantized else mx.bfloat16)
    assert set(dtypes.values()) == {mx.bfloat16}
    assert merged(mx.ones((1, 128), mx.bfloat16)).dtype == mx.bfloat16


def test_a_merged_dora_layers_rows_are_as_long_as_their_magnitudes() -> None:
    """Norms in bfloat16 would miss them by up to 1 in 256, all numbers of a row alike."""
    model = adapted(quantized=False)
    magnitudes = model.layer.m
    rows = mx.linalg.norm(merge(model).layer.weight.astype(mx.float32), axis=1)
    assert mx.abs(rows / magnitudes - 1).max().item() < 5e-4


def test_weights_of_another_dtype_than_the_norms_keep_it() -> None:
    model = adapted(quantized=False)
    model.norm.set_dtype(mx.float32)
    assert merge(model).layer.weight.dtype == mx.bfloat16
