"""Batches as a loss sees them: columns, and no prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import mlx.core as mx

from grpo.types import Batch

NO_PROMPTS = {
    "prompt_ids": mx.zeros((1, 1), mx.int32),
    "prompt_lengths": mx.ones(1, mx.int32),
    "prompt_index": mx.zeros(1, mx.int32),
}


def of_columns(
    trained: mx.array, weights: mx.array, advantages: mx.array | Sequence[float], **columns: mx.array
) -> Batch:
    """A batch of these columns, `[B, T]` each; advantages may be `[B]`, a number for each row."""
    advantages = mx.array(advantages)
    if advantages.ndim == 1:
        advantages = mx.broadcast_to(advantages[:, None], trained.shape)
    token_ids = mx.zeros(trained.shape, mx.int32)
    return Batch(**NO_PROMPTS, token_ids=token_ids, trained=trained, weights=weights, advantages=advantages, **columns)


def rows_of(batch: Batch, rows: slice | mx.array) -> Batch:
    """Some of a batch's rows."""
    names = [field.name for field in fields(batch) if field.name not in (*NO_PROMPTS, "beta")]
    known = {name: column for name in names if (column := getattr(batch, name)) is not None}
    return replace(batch, **{name: column[rows] for name, column in known.items()})
