"""`grpo bench head`: the cost of a 16-bit model's float32 logits, in decoding and in the update."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from grpo.benchmark.models import model_for
from grpo.benchmark.protocol import Measurement, alternate
from grpo.benchmark.rollout import ours
from grpo.benchmark.setting import Setting
from grpo.benchmark.updates import update_side
from grpo.benchmark.work import policy_of, recipe
from grpo.errors import UserError
from grpo.model.load import cast
from grpo.model.quantized import dtype_of
from grpo.model.widehead import widen_head

HEADS = {"model": False, "float32": True}
"""The values of `model.head_dtype`, and whether each widens the head."""


def head_costs(setting: Setting, dtype: str) -> list[Measurement]:
    """Decoding, then an update with gradient checkpointing, each with both heads in turns. GB counts both models, which
    are in memory at the same time.

    `dtype` is the data type of random weights, or "auto". Raises UserError for a float32 model, and for a model whose
    head is not found.
    """
    rows = alternate(
        f"decoding, {setting}",
        [ours(_model(setting, dtype, wide), setting, name=name) for name, wide in HEADS.items()],
        setting.runs,
    )
    optim = {"micro_batch_tokens": 16384, "gradient_checkpointing": True}
    cfg, sides = recipe(setting, optim), []
    for name, wide in HEADS.items():
        policy = policy_of(_model(setting, dtype, wide, adapter=False), cfg.optim)
        sides.append(update_side(name, policy, cfg, setting))
    return [*rows, *alternate(f"update, {setting}", sides, setting.runs)]


def _model(setting: Setting, dtype: str, wide: bool, adapter: bool = True) -> nn.Module:
    model = model_for(replace(setting, lora=setting.lora and adapter))
    if dtype != "auto":
        cast(model, getattr(mx, dtype))
        mx.eval(model.parameters())
    if dtype_of(model) == mx.float32:
        raise UserError("bench head: a float32 model has float32 logits anyway: use --dtype bfloat16")
    if wide and not widen_head(model):
        raise UserError("bench head: this model's head was not found, or already returns float32")
    return model
