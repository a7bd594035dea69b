"""The models to measure: real models, or models of real shapes with random weights, whose speed is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.device import setup
from grpo.benchmark.setting import Setting
from grpo.config import ModelConfig
from grpo.model.drawn import config_of, random_model, trained_adapters
from grpo.model.load import load
from grpo.model.mlxlm import BPEStreamingDetokenizer, TokenizerWrapper


def model_for(setting: Setting) -> nn.Module:
    """The setting's model, with an adapter on every linear layer if the setting has `lora`. Sets up the machine.

    The adapter's B is not zero, as in a trained adapter. Raises UserError for an unknown model.
    """
    model = base_model(setting)
    if setting.lora:
        trained_adapters(model)
    mx.eval(model.parameters())
    return model


def base_model(setting: Setting) -> nn.Module:
    """The setting's model without an adapter: bf16 on a GPU (a real model: as stored), float32 on a CPU.

    Its logits have the model's dtype, as in mlx-lm, with which the speed is compared.
    """
    setup()
    return (
        load(ModelConfig(name=setting.model, head_dtype="model"))[0]
        if setting.model
        else random_model(setting.shape, setting.bits)
    )


def write_model(setting: Setting, folder: Path) -> None:
    """Write the setting's model with random weights, and a tokenizer, in the layout of the Hub.

    The stop token is the last token of the vocabulary, which a model with random weights almost never samples.
    """
    model = base_model(setting)
    config = {**config_of(setting.shape), "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
              "hidden_act": "silu"}  # fmt: skip
    write_weights(model, {**config, "eos_token_id": config["vocab_size"] - 1}, folder)


def write_weights(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write a model and its config, with a small tokenizer, in the layout of the Hub."""
    from grpo.builtin.student import write_tokenizer

    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config.get("eos_token_id")}))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def vocabulary_of(model: nn.Module) -> int:
    """The number of the head's logits."""
    return int(model(mx.array([[0]])).shape[-1])  # MLX is lazy: the shape needs no computation


def tokenizer_for(setting: Setting, vocabulary: int) -> TokenizerWrapper:
    """The setting's tokenizer; for random weights, a byte-level tokenizer of four-letter words without a stop token."""
    if setting.model:
        return load(ModelConfig(name=setting.model))[1]
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrst"
    words = ["".join(letters[i // 20**k % 20] for k in range(4)) for i in range(vocabulary)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)
