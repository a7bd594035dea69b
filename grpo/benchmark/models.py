"""The models that are measured: real ones, or of real shapes with random weights, whose speed is the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from grpo.backend.device import on_gpu, setup
from grpo.benchmark.setting import Setting
from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.model.adapters import Adapters
from grpo.model.known import CONFIGS
from grpo.model.load import load

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "head_dim": 16, "intermediate_size": 64, "vocab_size": 256},
    "qwen3-1m": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "head_dim": 32, "intermediate_size": 384, "vocab_size": 2048},
    "qwen3-25m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
                  "head_dim": 64, "intermediate_size": 1280, "vocab_size": 6144},
    "qwen3-0.6b": CONFIGS["Qwen/Qwen3-0.6B"],
    "qwen3-1.7b": CONFIGS["Qwen/Qwen3-1.7B"],
    "qwen3-moe-2m": {"model_type": "qwen3_moe", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "vocab_size": 2048,
                     "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                     "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
}  # fmt: skip
"""Qwen3 by its dimensions; 0.6b and 1.7b are the published models', the others small ones of the same kind."""

RANK = 16


def config_of(shape: str) -> dict[str, Any]:
    """The `config.json` of a shape. Raises UserError for a name that is not there."""
    if shape not in SHAPES:
        raise UserError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    fixed = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
             "tie_word_embeddings": True}  # fmt: skip
    return {**fixed, **SHAPES[shape]}


def model_for(setting: Setting) -> nn.Module:
    """The setting's model on a machine that is set up, with an adapter on every linear layer if it has `lora`.

    The adapter's B is not zero, so that it does what a trained one does. Raises UserError for an unknown model.
    """
    model = base_model(setting)
    if setting.lora:
        trained_adapters(model)
    mx.eval(model.parameters())
    return model


def base_model(setting: Setting) -> nn.Module:
    """The setting's model without an adapter: bf16 on a GPU (as stored, if it is a real one), float32 on a CPU.

    Its logits have its own dtype, as mlx-lm has it that it is held against.
    """
    setup()
    return (
        load(ModelConfig(name=setting.model, head_dtype="model"))[0] if setting.model else _random_model(setting.shape)
    )


def trained_adapters(model: nn.Module) -> Adapters:
    """An adapter as training leaves it: on every linear layer, its B not zero."""
    adapters = Adapters(model, AdapterConfig(rank=RANK), mx.random.key(0))
    keys = mx.random.split(mx.random.key(1), len(adapters.state()))
    drawn = {
        path: (mx.random.normal(a.shape, key=key) * 0.01).astype(a.dtype)
        for (path, a), key in zip(adapters.state().items(), keys, strict=True)
    }
    adapters.load_state(drawn)
    return adapters


def _random_model(shape: str) -> nn.Module:
    from mlx_lm.utils import _get_classes

    config = config_of(shape)
    mx.random.seed(0)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    dtype = mx.bfloat16 if on_gpu() else mx.float32
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    model.freeze()
    mx.eval(model.parameters())
    return model


def write_model(setting: Setting, folder: Path) -> None:
    """The setting's model of random weights, with a tokenizer, as the Hub lays models out.

    The token that stops is the last of the vocabulary, which a model with random weights next to never samples.
    """
    model = base_model(setting)
    config = {**config_of(setting.shape), "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
              "hidden_act": "silu"}  # fmt: skip
    write_weights(model, {**config, "eos_token_id": config["vocab_size"] - 1}, folder)


def write_weights(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """A model by its config, with a small tokenizer of its own, as the Hub lays models out."""
    from grpo.builtin.student import write_tokenizer

    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config.get("eos_token_id")}))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def vocabulary_of(model: nn.Module) -> int:
    """The tokens that the model's head has logits for."""
    return int(model(mx.array([[0]])).shape[-1])  # the shape alone: nothing is computed


@dataclass(frozen=True, slots=True)
class NoTokenizer:
    """Stands in for a tokenizer: no text, and no token that stops, so that every completion has its full length."""

    eos_token_ids: frozenset[int] = frozenset()

    def decode(self, _ids: object, **_kwargs: object) -> str:
        return ""


def tokenizer_for(setting: Setting, vocabulary: int) -> TokenizerWrapper:
    """The setting's tokenizer, or for random weights a byte-level one of words of four letters, with no stop token."""
    if setting.model:
        return load(ModelConfig(name=setting.model))[1]
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrst"
    words = ["".join(letters[i // 20**k % 20] for k in range(4)) for i in range(vocabulary)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)
