"""Models with random weights, by shape, for benchmarks and checks that do not depend on a model's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from grpo.backend.device import on_gpu
from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.model.adapters import Adapters
from grpo.model.known import CONFIGS
from grpo.model.mlxlm import new_model

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "head_dim": 16, "intermediate_size": 64, "vocab_size": 256},
    "qwen3-1m": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "head_dim": 32, "intermediate_size": 384, "vocab_size": 2048},
    "qwen3-25m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
                  "head_dim": 64, "intermediate_size": 1280, "vocab_size": 6144},
    "qwen3-0.6b": CONFIGS["Qwen/Qwen3-0.6B"],
    "qwen3-1.7b": CONFIGS["Qwen/Qwen3-1.7B"],
    "qwen3-4b": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936},
    "qwen3-8b": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
                 "max_position_embeddings": 131072},
    "qwen3-moe-2m": {"model_type": "qwen3_moe", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "vocab_size": 2048,
                     "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                     "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
}  # fmt: skip
"""Dimensions of Qwen3 models: 0.6b, 1.7b, 4b and 8b are published models, the others small models of the same kind."""


RANK = 16


def config_of(shape: str) -> dict[str, Any]:
    """The `config.json` of a shape. Raises UserError for an unknown name."""
    if shape not in SHAPES:
        raise UserError(f"no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    fixed = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
             "tie_word_embeddings": True}  # fmt: skip
    return {**fixed, **SHAPES[shape]}


def random_model(shape: str, bits: int | None = None) -> nn.Module:
    """A frozen model of a shape, bfloat16 on a GPU and float32 on a CPU. The weights are the same at every call.

    With `bits`, matrices are quantized to this number of bits, in groups of 64.
    """
    mx.random.seed(0)
    model = new_model(config_of(shape))
    dtype = mx.bfloat16 if on_gpu() else mx.float32
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    if bits is not None:
        nn.quantize(model, bits=bits)
    model.freeze()
    mx.eval(model.parameters())
    return model


def trained_adapters(model: nn.Module) -> Adapters:
    """An adapter on every linear layer, with a nonzero B, as after training."""
    adapters = Adapters(model, AdapterConfig(rank=RANK), mx.random.key(0))
    keys = mx.random.split(mx.random.key(1), len(adapters.state()))
    drawn = {
        path: (mx.random.normal(a.shape, key=key) * 0.01).astype(a.dtype)
        for (path, a), key in zip(adapters.state().items(), keys, strict=True)
    }
    adapters.load_state(drawn)
    return adapters


@dataclass(frozen=True, slots=True)
class NoTokenizer:
    """Replaces a tokenizer: decodes to empty text and has no stop token, so every completion has its full length."""

    eos_token_ids: frozenset[int] = frozenset()

    def decode(self, _ids: object, **_kwargs: object) -> str:
        return ""
