"""Whether a run's longest sequences stay within the positions that its model was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from grpo.errors import UserError

HEADS = ("num_attention_heads", "n_head", "n_heads")
"""How many heads of attention there are, by the names in configs. A model that has none has no positions."""


def position_note(model: nn.Module, prompt: int, completion: int) -> str | None:
    """A warning where `prompt` + `completion` tokens are more than a model with scaled rotary positions was made for.

    Raises UserError where the model's positions are not scaled. Beyond `max_position_embeddings` such a model writes
    noise, or reads past its table of learned positions, and the run would train on the result; other generators (vLLM)
    refuse it too. Scaled positions (`rope_scaling`: YaRN and others) are made to reach further, how far is not always
    in the config, so they get a warning. None where all fits, and for a model whose config names no limit.
    """
    limit = _limit(model)
    if limit is None or prompt + completion <= limit:
        return None
    said = (
        f"prompts of up to {prompt:,} tokens and completions of up to {completion:,} (rollout.max_completion_length) "
        f"are {prompt + completion:,} tokens together, and the model was made for {limit:,} (max_position_embeddings)"
    )
    if _is_scaled(model):
        return f"{said}: its rope_scaling may reach further, so read long completions before you trust them"
    raise UserError(
        f"{said}. Lower rollout.max_completion_length or data.max_prompt_length, or take a model with a longer context "
        "(some have one with a rope_scaling in their config.json)"
    )


def limit_of(model: nn.Module) -> int | None:
    """The positions that a model with unscaled positions was made for; None where no number says that."""
    return None if _is_scaled(model) else _limit(model)


def _limit(model: nn.Module) -> int | None:
    """None of a model without attention too: mlx-lm gives Mamba-2, which knows no positions, a number of its own."""
    if not any(_setting(model, name) for name in HEADS):
        return None
    limit = next(
        (found for name in ("max_position_embeddings", "n_positions") if (found := _setting(model, name))), None
    )
    return limit if isinstance(limit, int) else None


def _is_scaled(model: nn.Module) -> bool:
    """Whether the rotary positions are scaled, by the older name in configs or the newer one."""
    settings = [_setting(model, name) for name in ("rope_scaling", "rope_parameters")]
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in settings if isinstance(rope, Mapping)]
    return any(kind != "default" for kind in kinds)


def _setting(model: nn.Module, name: str) -> Any:
    """A setting of the model's config, or of the part of the config that is about text."""
    arguments = getattr(model, "args", None)
    inner = getattr(arguments, "text_config", None)
    own = getattr(arguments, name, None)
    return inner.get(name) if own is None and isinstance(inner, Mapping) else own
