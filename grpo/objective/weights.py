"""Normalizers: how a loss is averaged, as a weight for each token.

The denominators count over a whole update (`Totals`). They are fixed before the update is split into micro-batches or
over ranks, so the sum of the parts' gradients does not depend on the split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from grpo.config import LossConfig
from grpo.types import Totals


def token_weights(
    trained: mx.array,
    totals: Totals,
    cfg: LossConfig,
    max_completion_length: int,
    of_completion: mx.array | None = None,
) -> mx.array:
    """The weight of each token's loss: `[B, T]` float32, for rows with the mask `trained`, `[B, T]`.

        sequence      1 / (N · trained tokens of the completion)
        sequence_sum  1 / N
        token         1 / trained tokens of the update
        constant      1 / (N · max_completion_length)
        micro_batch   1 / trained tokens of these rows; the caller divides by the number of micro-batches

    `totals` has N and the number of trained tokens for the whole update; these rows may be a part of it. A row without
    trained tokens has weight 0, but counts in N, because it was sampled.

    A conversation that continues in new rows (`environment.thinking: drop`) is one completion: it counts once in N, and
    its rows share its weight in proportion to their trained tokens. `of_completion`, `[B]`, is the number of trained
    tokens in the whole completion of each row; None: each row is a whole completion.
    """
    trained = trained.astype(mx.float32)
    match cfg.preset.normalize:
        case "sequence":
            whole = trained.sum(axis=1) if of_completion is None else of_completion
            return trained / (totals.rows * mx.maximum(whole[:, None].astype(mx.float32), 1))
        case "sequence_sum":
            return trained / totals.rows
        case "token":
            return trained / max(totals.tokens, 1)
        case "micro_batch":
            return trained / mx.maximum(trained.sum(), 1)
        case "constant":
            return trained / (totals.rows * max_completion_length)


def weights_of_chosen(
    weights: Sequence[mx.array],
    chosen: Sequence[mx.array],
    cfg: LossConfig,
    everywhere: Callable[[mx.array], mx.array] = lambda sums: sums,
) -> list[mx.array]:
    """Move the weights of a minibatch's micro-batches to the chosen tokens, a mask for each: `[B, T]` float32.

    Denominators that count tokens then count the chosen tokens; N stays the number of sampled completions. So one sum
    of weights stays the same:

        sequence                the sum over each row that has a chosen token: a completion, or a part of one
        token                   the sum over the minibatch
        micro_batch             the sum over each micro-batch

    `sequence_sum` and `constant` count no tokens, so the weight of the tokens that are not chosen is lost. `everywhere`
    sums an array over the processes that share the minibatch.
    """
    kept = [mx.where(part > 0, weight, 0.0) for weight, part in zip(weights, chosen, strict=True)]
    match cfg.preset.normalize:
        case "sequence":
            totals, lefts = ([part.sum(axis=1, keepdims=True) for part in parts] for parts in (weights, kept))
        case "micro_batch":
            totals, lefts = ([part.sum() for part in parts] for parts in (weights, kept))
        case "token":
            zero = mx.array(0.0)
            sums = everywhere(mx.stack([sum((part.sum() for part in parts), zero) for parts in (weights, kept)]))
            totals, lefts = ([part] * len(kept) for part in sums)
        case "sequence_sum" | "constant":
            return kept
    return [_scaled(part, total, left) for part, total, left in zip(kept, totals, lefts, strict=True)]


def _scaled(weights: mx.array, total: mx.array, left: mx.array) -> mx.array:
    """Scale weights from the sum `left` to the sum `total`; zeros stay zeros."""
    return weights * mx.where(left > 0, total / mx.where(left > 0, left, 1.0), 0.0)
