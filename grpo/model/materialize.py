"""Evaluates a model's arrays one at a time, to keep peak memory low.

MLX reads, casts and quantizes weights lazily. Evaluated together, all weights exist as floats before the first is
quantized: a 4-bit model then needs three to eight times its size to load. Evaluated in turn, each array frees its
sources before the next begins.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def materialize(parameters: Any) -> None:
    """Evaluate a model's arrays one after another. The caller must not hold references to the arrays' sources.

    Arrays outside the layers (the embedding and the head, often ten times a layer's largest matrix) come first, while
    memory is still empty. So the peak is the finished model, or the sources of the embedding if they are larger:
    6 bytes per number if bfloat16 is cast to float32 and then quantized (on a CPU), 2 if it is quantized directly. A
    small 4-bit model with a vocabulary of 150,000 tokens takes more memory during loading than afterwards.
    """
    arrays = tree_flatten(parameters)
    arrays.sort(key=lambda found: "layers" in found[0].split("."))
    for _, array in arrays:
        mx.eval(array)
    mx.clear_cache()  # cached buffers have the size of float arrays, which no later array needs
