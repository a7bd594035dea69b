"""Merging adapters into the base weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from grpo.model.quantized import dequantized, dtype_of, quantized_like


def merge(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Merge the adapter's layers into the base weights, in place. Returns the model.

    Quantized weights stay quantized unless `dequantize` is set.
    """
    dtype = dtype_of(model)
    fused = [(path, _fused(m, dequantize, dtype)) for path, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    return model


def _fused(layer: Any, dequantize: bool, dtype: mx.Dtype) -> nn.Module:
    """The base layer with the adapter added to its weights. The sum is computed in `dtype`."""
    base = layer.linear
    layer.linear = dequantized(base, dtype)
    stored = layer.linear.weight.dtype
    if "m" in layer:  # DoRA: training takes row norms in float32, mlx-lm's `fuse` in the dtype of the weights
        layer.linear.weight = layer.linear.weight.astype(mx.float32)
    made: nn.Module = layer.fuse()
    made.weight = made.weight.astype(stored)
    return made if dequantize or "scales" not in base else quantized_like(made, base)
