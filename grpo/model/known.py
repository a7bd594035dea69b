"""The `config.json` shapes of the models in the bundled recipes, for estimates without the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_QWEN2: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                          "max_position_embeddings": 32768, "tie_word_embeddings": True}  # fmt: skip
_QWEN3: dict[str, Any] = {**_QWEN2, "model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960}
_FOUR_BITS: dict[str, Any] = {"quantization": {"group_size": 64, "bits": 4}}


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int) -> dict[str, int]:
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": inner}  # fmt: skip


CONFIGS: Mapping[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2 | _sizes(896, 24, 14, 2, 4864),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": _QWEN2 | _sizes(1536, 28, 12, 2, 8960),
    "Qwen/Qwen2.5-3B": _QWEN2 | _sizes(2048, 36, 16, 2, 11008),
    "Qwen/Qwen2.5-7B": _QWEN2 | _sizes(3584, 28, 28, 4, 18944) | {"vocab_size": 152064, "tie_word_embeddings": False},
    "Qwen/Qwen3-0.6B": _QWEN3 | _sizes(1024, 28, 16, 8, 3072),
    "Qwen/Qwen3-1.7B": _QWEN3 | _sizes(2048, 28, 16, 8, 6144),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": (
        _QWEN3 | _sizes(1024, 28, 16, 8, 3072)
        | {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    ),
    "mlx-community/Qwen3-8B-4bit": (
        _QWEN3 | _sizes(4096, 36, 32, 8, 12288) | _FOUR_BITS | {"tie_word_embeddings": False}
    ),
    "mlx-community/Qwen3-30B-A3B-4bit": (
        _QWEN3 | _sizes(2048, 48, 32, 4, 6144) | _FOUR_BITS
        | {"model_type": "qwen3_moe", "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8,
           "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    ),
}  # fmt: skip
