"""A user's own loss, `loss.use`: errors in it become errors that name it."""

from __future__ import annotations

from dataclasses import fields

import mlx.core as mx

from grpo.config import LossConfig
from grpo.errors import RunError
from grpo.objective.loss import CustomLoss
from grpo.types import Batch


def guarded(custom: CustomLoss) -> CustomLoss:
    """The same loss, but it raises RunError if the function fails or does not return one loss for each token."""

    def call(current: mx.array, batch: Batch, cfg: LossConfig) -> mx.array:
        named = f"loss.use: {cfg.use}" if cfg.use else f"loss: {getattr(custom, '__name__', custom)}"
        try:
            per_token = custom(current, batch, cfg)
        except Exception as error:
            said = f"{type(error).__name__}: {error}{_columns(error)}"
            raise RunError(f"{named} failed: {said}") from error
        if not isinstance(per_token, mx.array) or per_token.shape != current.shape:
            shape = getattr(per_token, "shape", type(per_token).__name__)
            raise RunError(f"{named} returned {shape}, not an array of the logprobs' shape {current.shape}")
        return per_token

    return call


def _columns(error: Exception) -> str:
    """A sentence that lists the fields of a batch, if the loss read a field that does not exist; otherwise empty."""
    if not (isinstance(error, AttributeError) and isinstance(error.obj, Batch)):
        return ""
    return f". A batch has {', '.join(field.name for field in fields(Batch))}."
