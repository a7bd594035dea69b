"""Adapters put into the weights below them for good."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from grpo.model.quantized import dequantized, dtype_of, quantized_like


def merge(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Put the adapter's layers into the weights below them, which stay quantised unless asked. Returns the model."""
    dtype = dtype_of(model)
    fused = [(path, _fused(m, dequantize, dtype)) for path, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    return model


def _fused(layer: Any, dequantize: bool, dtype: mx.Dtype) -> nn.Module:
    """A layer with its adapter in its weights, which are added up in `dtype` whatever they are stored in."""
    base = layer.linear
    layer.linear = dequantized(base, dtype)
    stored = layer.linear.weight.dtype
    if "m" in layer:  # DoRA: mlx-lm takes the norms of rows in the dtype of the weights, and training in float32
        layer.linear.weight = layer.linear.weight.astype(mx.float32)
    made: nn.Module = layer.fuse()
    made.weight = made.weight.astype(stored)
    return made if dequantize or "scales" not in base else quantized_like(made, base)
