"""Small models of the architectures that people train, with random weights: the parts and ratios of the large ones.

Each is given as its `config.json`. Widths are multiples of 64, so that every layer can be quantised in groups of 64.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from grpo.model.mlxlm import new_model

Config = dict[str, Any]

COMMON: Config = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 276,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
QWEN_EXPERTS: Config = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
RECURRENT: Config = {
    "full_attention_interval": 2,  # a recurrent layer, and one with attention
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
SLIDING: Config = {
    "num_hidden_layers": 4,  # every second one with a sliding window
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
}
ROUTED_EXPERTS: Config = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}

LATENT: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}

SMALL: dict[str, Config] = {
    "Qwen2.5": {"model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "Qwen3-MoE (30B-A3B)": {"model_type": "qwen3_moe", "head_dim": 32, **QWEN_EXPERTS},
    "Qwen3-Next": {
        "model_type": "qwen3_next",
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        **RECURRENT,
        "shared_expert_intermediate_size": 64,
        **QWEN_EXPERTS,
    },
    "Qwen3.5": {
        "model_type": "qwen3_5",
        "text_config": {**COMMON, **RECURRENT, "model_type": "qwen3_5_text", "head_dim": 32},
    },
    "GLM-4": {"model_type": "glm4", "head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5},
    "GLM-4.5-Air": {
        "model_type": "glm4_moe",
        "head_dim": 32,
        "use_qk_norm": True,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "n_group": 1,
        "topk_group": 1,
        **ROUTED_EXPERTS,
    },
    "GLM-4.7-Flash": {"model_type": "glm4_moe_lite", **LATENT, "n_group": 1, "topk_group": 1, **ROUTED_EXPERTS},
    "DeepSeek-V3, Kimi K2": {"model_type": "deepseek_v3", **LATENT, "n_group": 2, "topk_group": 1, **ROUTED_EXPERTS},
    "Llama 3": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "Gemma 2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma 3 1B": {"model_type": "gemma3_text", **SLIDING},
    "Gemma 3 4B and larger": {
        "model_type": "gemma3",
        "text_config": {**COMMON, **SLIDING, "model_type": "gemma3_text"},
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Phi-2": {"model_type": "phi", "num_key_value_heads": 4, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "Phi-3, Phi-4": {"model_type": "phi3"},
    "OLMo 2": {"model_type": "olmo2"},
}
"""By their names in the manual's table: what differs from COMMON."""


def write(name: str, folder: Path, tokenizer: Path) -> Path:
    """Make a model with random weights, in the layout of the Hub, with the tokenizer of another such folder."""
    config = {**COMMON, **SMALL[name]}
    mx.random.seed(0)
    model = new_model(config)
    # What starts as zeros or ones (norms, biases, routers) would hide that it is used.
    weights = {
        path: array + 0.3 * mx.random.normal(array.shape) if mx.all(array == array.reshape(-1)[0]).item() else array
        for path, array in tree_flatten(model.parameters())
    }
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("model*", "config.json"))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder
