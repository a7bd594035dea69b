"""How many of an update's micro-batches a CPU computes side by side."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.lanes import lanes_for
from grpo.backend.ranks import Ranks

MOST_MULTIPLICATIONS = 2**27
"""Of a matrix product, beyond which a CPU's cores are all busy with it. Measured on two cores: micro-batches of 1,280
tokens through matrices of 128 × 384 were 1.2 × as fast in two lanes, those of 576 tokens through 512 × 1,280 no faster,
and they took 0.67 GB instead of 0.41."""
MOST_GRADIENT = 2**26
"""Bytes of a gradient that there may be one of for each lane."""


def update_lanes(model: nn.Module, tokens: int, parts: int, ranks: Ranks | None = None) -> int:
    """Lanes for so many micro-batches of up to so many tokens: one where the products keep the cores busy, or where a
    gradient for each lane would take more memory than the lanes are worth."""
    trained: int = sum(4 * array.size for _, array in tree_flatten(model.trainable_parameters()))
    busy = _largest_matrix(model) * tokens > MOST_MULTIPLICATIONS
    return 1 if parts < 2 or busy or trained > MOST_GRADIENT else lanes_for(parts, ranks)


def _largest_matrix(model: nn.Module) -> int:
    """Numbers in the largest matrix of a layer that is not quantized: MLX computes with those on one core."""
    matrices = (module["weight"] for layer in model.layers for module in layer.modules() if type(module) is nn.Linear)
    return max((matrix.size for matrix in matrices), default=0)


def tokens_of(arrays: dict[str, mx.array]) -> int:
    """Of a micro-batch by its arrays, padding included."""
    return int(arrays["prompt_ids"].size + arrays["token_ids"].size)
