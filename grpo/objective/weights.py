"""How a loss is averaged, as a weight for each token.

The denominators are those of the whole step. They are computed once, before it is split into micro-batches or
over ranks, so that the sum of the parts' gradients is the gradient, whatever the split.
"""

from __future__ import annotations

import mlx.core as mx

from grpo.config import LossConfig


def token_weights(mask: mx.array, cfg: LossConfig, max_completion_length: int) -> mx.array:
    """The weight of each token's loss: `[N, T]` float32 from the step's whole mask, `[N, T]`.

        grpo     1 / (N · tokens of the sequence)     arXiv 2402.03300
        dapo     1 / tokens of the step               arXiv 2503.14476
        dr_grpo  1 / (N · max_completion_length)      arXiv 2503.20783

    A row without tokens has weight 0 throughout.
    """
    mask = mask.astype(mx.float32)
    rows = mask.shape[0]
    match cfg.type:
        case "grpo":
            return mask / (rows * mx.maximum(mask.sum(axis=1, keepdims=True), 1))
        case "dapo":
            return mask / mx.maximum(mask.sum(), 1)
        case "dr_grpo":
            return mask / (rows * max_completion_length)
