"""Checks that a run's longest sequences stay within the positions that its model was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from grpo.errors import UserError

HEADS = ("num_attention_heads", "n_head", "n_heads")
"""Names of the number of attention heads in configs. A model without attention heads has no positions."""


def position_note(model: nn.Module, prompt: int, completion: int) -> str | None:
    """A warning if `prompt` + `completion` tokens are more than a model with scaled rotary positions was made for.

    Raises UserError if the model's positions are not scaled. Beyond `max_position_embeddings` such a model writes
    noise, or reads past its table of learned positions, and the run would train on the result; other generators (vLLM)
    refuse this too. Scaled positions (`rope_scaling`: YaRN and others) reach further. How far is not always in the
    config, so they get a warning. Returns None if everything fits, or if the config has no limit.
    """
    limit = _limit(model)
    if limit is None or prompt + completion <= limit:
        return None
    said = (
        f"prompts of up to {prompt:,} tokens and completions of up to {completion:,} (rollout.max_completion_length) "
        f"are {prompt + completion:,} tokens together, but the model was made for {limit:,} (max_position_embeddings)"
    )
    if _is_scaled(model):
        return f"{said}: its rope_scaling may reach further, so read long completions before you trust them"
    raise UserError(
        f"{said}. Lower rollout.max_completion_length or data.max_prompt_length, or choose a model with a longer "
        "context (for some models, a rope_scaling in config.json gives a longer context)"
    )


def limit_of(model: nn.Module) -> int | None:
    """The number of positions that a model with unscaled positions was made for; None if unknown."""
    return None if _is_scaled(model) else _limit(model)


def _limit(model: nn.Module) -> int | None:
    """The number of positions in the config; None if there is none, or for a model without attention.

    (Mamba-2 has no positions, but mlx-lm gives it a number.)
    """
    if not any(_setting(model, name) for name in HEADS):
        return None
    limit = next(
        (found for name in ("max_position_embeddings", "n_positions") if (found := _setting(model, name))), None
    )
    return limit if isinstance(limit, int) else None


def _is_scaled(model: nn.Module) -> bool:
    """Whether the rotary positions are scaled, by the older or the newer name in configs."""
    settings = [_setting(model, name) for name in ("rope_scaling", "rope_parameters")]
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in settings if isinstance(rope, Mapping)]
    return any(kind != "default" for kind in kinds)


def _setting(model: nn.Module, name: str) -> Any:
    """A setting of the model's config, or of its `text_config`."""
    arguments = getattr(model, "args", None)
    inner = getattr(arguments, "text_config", None)
    own = getattr(arguments, name, None)
    return inner.get(name) if own is None and isinstance(inner, Mapping) else own
