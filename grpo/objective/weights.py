"""How a loss is averaged, as a weight for each token.

The denominators are those of the whole step. They are computed once, before it is split into micro-batches or
over ranks, so that the sum of the parts' gradients is the gradient, whatever the split.
"""

from __future__ import annotations

import mlx.core as mx

from grpo.config import LossConfig


def token_weights(mask: mx.array, cfg: LossConfig, max_completion_length: int) -> mx.array:
    """The weight of each token's loss: `[N, T]` float32 from the step's whole mask, `[N, T]`.

        sequence      1 / (N · tokens of the completion)
        sequence_sum  1 / N
        token         1 / tokens of the step
        constant      1 / (N · max_completion_length)
        micro_batch   as token, of a mask that is one micro-batch; the caller divides by their number

    A row without tokens has weight 0 throughout, and counts among the N: it was sampled.
    """
    mask = mask.astype(mx.float32)
    rows = mask.shape[0]
    match cfg.preset.normalize:
        case "sequence":
            return mask / (rows * mx.maximum(mask.sum(axis=1, keepdims=True), 1))
        case "sequence_sum":
            return mask / rows
        case "token" | "micro_batch":
            return mask / mx.maximum(mask.sum(), 1)
        case "constant":
            return mask / (rows * max_completion_length)
