"""How many of an update's micro-batches a CPU computes in parallel."""

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
"""Multiplications in a matrix product beyond which the product alone keeps all cores of a CPU busy. Measured on two
cores: micro-batches of 1,280 tokens through matrices of 128 × 384 were 1.2 × as fast in two lanes. Micro-batches of 576
tokens through 512 × 1,280 were no faster, and took 0.67 GB instead of 0.41."""
MOST_GRADIENT = 2**23
"""Maximum bytes of a gradient for which each lane may hold its own gradient: adapters, and fully trained small models.
For larger gradients, the memory plan assumes a single one."""


def lanes_worth(model: nn.Module, loss: LossConfig) -> int:
    """The minimum number of micro-batches in a process's part of an update: 1 if the gradient is large."""
    return 1 if _gradient(model) > MOST_GRADIENT else parts_for(loss)


def parts_for(loss: LossConfig) -> int:
    """The minimum number of micro-batches for this loss, independent of the model.

    It is 1 on a GPU, and for a loss that is averaged per micro-batch and so depends on their number. Otherwise it is 2,
    independent of the number of cores, so that sums are the same on every machine.
    """
    return 1 if on_gpu() or loss.preset.normalize == "micro_batch" else 2


def update_lanes(model: nn.Module, tokens: int, parts: int, ranks: Ranks | None = None) -> int:
    """The number of lanes for `parts` micro-batches of up to `tokens` tokens.

    It is 1 if the matrix products keep the cores busy, or if a gradient for each lane would take too much memory.
    """
    exchanges = is_divided(model) or is_spread(model)  # two lanes would mix up their exchanges with other processes
    if exchanges or (number := lanes_for(parts, ranks)) == 1:
        return 1  # return early, because the walk through the model's modules below takes milliseconds
    busy = _largest_matrix(model) * tokens > MOST_MULTIPLICATIONS
    return 1 if busy or _gradient(model) > MOST_GRADIENT else number


def _gradient(model: nn.Module) -> int:
    """Bytes of the model's float32 gradient."""
    return sum(4 * array.size for _, array in tree_flatten(model.trainable_parameters()))


def _largest_matrix(model: nn.Module) -> int:
    """The size of the largest matrix in a layer. Quantized matrices do not count: MLX multiplies them on one core."""
    matrices = (module["weight"] for layer in model.layers for module in layer.modules() if type(module) is nn.Linear)
    return max((matrix.size for matrix in matrices), default=0)


def tokens_of(arrays: dict[str, mx.array]) -> int:
    """The number of tokens in a micro-batch, given as its arrays, padding included."""
    return int(arrays["prompt_ids"].size + arrays["token_ids"].size)
