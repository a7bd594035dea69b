"""Models of real shapes with random weights: speed does not depend on what they have learnt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from grpo.backend.device import on_gpu
from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.model.adapters import Adapters

SHAPES = {
    "qwen3-1m": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "head_dim": 32, "intermediate_size": 384, "vocab_size": 2048},
    "qwen3-25m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
                  "head_dim": 64, "intermediate_size": 1280, "vocab_size": 6144},
    "qwen3-0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
                   "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936},
}  # fmt: skip
"""Qwen3 by its dimensions; the third is Qwen3-0.6B's."""


def shape_names() -> str:
    return ", ".join(SHAPES)


def _config(shape: str) -> dict[str, Any]:
    if shape not in SHAPES:
        raise UserError(f"no shape {shape!r}; there are {shape_names()}")
    fixed = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
             "tie_word_embeddings": True}  # fmt: skip
    return {**fixed, **SHAPES[shape]}


def make_model(shape: str, rank: int | None = 16) -> nn.Module:
    """A Qwen3 of a named shape: bf16 on a GPU, float32 on a CPU, with LoRA on every linear layer unless `rank` is None.

    The adapter's B is not zero, so that it does what a trained one does. Raises UserError for a name that is not there.
    """
    from mlx_lm.models import qwen3

    config = _config(shape)
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs(**config))
    dtype = mx.bfloat16 if on_gpu() else mx.float32
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    if rank is not None:
        adapters = Adapters(model, AdapterConfig(rank=rank), mx.random.key(0))
        adapters.load_state(
            {path: (mx.random.normal(a.shape) * 0.01).astype(a.dtype) for path, a in adapters.state().items()}
        )
    mx.eval(model.parameters())
    return model


def write_model(shape: str, folder: Path) -> None:
    """The model of a shape without an adapter, with a tokenizer, as the Hub lays models out, for a peer to load.

    The token that stops is the last of the vocabulary, which a model with random weights next to never samples.
    """
    from grpo.builtin.student import write_tokenizer

    folder.mkdir(parents=True)
    model = make_model(shape, rank=None)
    config = {**_config(shape), "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "hidden_act": "silu"}
    write_tokenizer(folder)
    stop = config["vocab_size"] - 1
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": stop}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


@dataclass(frozen=True, slots=True)
class NoTokenizer:
    """Stands in for a tokenizer: no text, and no token that stops, so that every completion has its full length."""

    eos_token_ids: frozenset[int] = frozenset()

    def decode(self, _ids: object, **_kwargs: object) -> str:
        return ""
