"""How many of an update's micro-batches a CPU computes side by side."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.device import on_gpu
from grpo.backend.lanes import lanes_for
from grpo.backend.ranks import Ranks
from grpo.config import LossConfig
from grpo.model.fsdp import is_spread
from grpo.model.tensor import is_divided

MOST_MULTIPLICATIONS = 2**27
"""Of a matrix product, beyond which a CPU's cores are all busy with it. Measured on two cores: micro-batches of 1,280
tokens through matrices of 128 × 384 were 1.2 × as fast in two lanes, those of 576 tokens through 512 × 1,280 no faster,
and they took 0.67 GB instead of 0.41."""
MOST_GRADIENT = 2**23
"""Bytes of a gradient that there may be one of for each lane: an adapter's, or a small model's whose weights all train.
Larger models are promised one gradient."""


def lanes_worth(model: nn.Module, loss: LossConfig) -> int:
    """Into how many micro-batches at least a process's part of an update is cut: one where the gradient is large."""
    return 1 if _gradient(model) > MOST_GRADIENT else parts_for(loss)


def parts_for(loss: LossConfig) -> int:
    """Into how many micro-batches at least rows are cut for this loss, whatever the model.

    One on a GPU, and where a loss is averaged over each micro-batch by itself, so that it depends on their number.
    Otherwise two: not as many as there are cores, so that the sums are the same everywhere.
    """
    return 1 if on_gpu() or loss.preset.normalize == "micro_batch" else 2


def update_lanes(model: nn.Module, tokens: int, parts: int, ranks: Ranks | None = None) -> int:
    """Lanes for so many micro-batches of up to so many tokens: one where the products keep the cores busy, or where a
    gradient for each lane would take more memory than the lanes are worth."""
    exchanges = is_divided(model) or is_spread(model)  # and two lanes would mix what they exchange
    if exchanges or (number := lanes_for(parts, ranks)) == 1:
        return 1  # before anything walks through the model's modules, which takes milliseconds
    busy = _largest_matrix(model) * tokens > MOST_MULTIPLICATIONS
    return 1 if busy or _gradient(model) > MOST_GRADIENT else number


def _gradient(model: nn.Module) -> int:
    """Its bytes."""
    return sum(4 * array.size for _, array in tree_flatten(model.trainable_parameters()))


def _largest_matrix(model: nn.Module) -> int:
    """Numbers in the largest matrix of a layer that is not quantized: MLX computes with those on one core."""
    matrices = (module["weight"] for layer in model.layers for module in layer.modules() if type(module) is nn.Linear)
    return max((matrix.size for matrix in matrices), default=0)


def tokens_of(arrays: dict[str, mx.array]) -> int:
    """Of a micro-batch by its arrays, padding included."""
    return int(arrays["prompt_ids"].size + arrays["token_ids"].size)
