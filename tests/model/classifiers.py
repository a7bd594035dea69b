"""Small reward models on disk, as the Hub has them, and what transformers would make of them, in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

VOCABULARY = 200
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "id2label": {"0": "LABEL_0"},
}
KINDS = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
"""mlx-lm's name of an architecture, and how transformers' class begins."""
WIDE = {"qwen3"}
"""Architectures whose heads are together wider than the hidden states here."""


def config_of(kind: str, vocabulary: int = VOCABULARY, **changes: Any) -> dict[str, Any]:
    heads = {} if kind in WIDE else {"head_dim": 8}
    named = {"model_type": kind, "architectures": [f"{KINDS[kind]}ForSequenceClassification"], "vocab_size": vocabulary}
    return {**CONFIG, **heads, **named, **changes}


def weights_of(config: Mapping[str, Any], seed: int = 0, labels: int = 1) -> dict[str, np.ndarray]:
    """Random weights under transformers' names; norms are near 1, so that none of them is lost."""
    draw = np.random.default_rng(seed)
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys, size = config["num_key_value_heads"], config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "score.weight": (labels, width),
    }
    for place in range(config["num_hidden_layers"]):
        layer = f"model.layers.{place}."
        projected = {"q": heads * size, "k": keys * size, "v": keys * size}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (wide, width) for name, wide in projected.items()}
        if config["model_type"] == "qwen2":
            shapes |= {f"{layer}self_attn.{name}_proj.bias": (wide,) for name, wide in projected.items()}
        if config["model_type"] == "qwen3":
            shapes |= {f"{layer}self_attn.{name}_norm.weight": (size,) for name in "qk"}
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, heads * size)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    spread = {name: shape[-1] ** -0.5 if len(shape) > 1 else 0.3 for name, shape in shapes.items()}
    drawn = {name: draw.normal(0, spread[name], shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: 1 + array if "norm" in name else array for name, array in drawn.items()}


def score(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], ids: Sequence[int]) -> float:
    """What transformers' `…ForSequenceClassification` answers for one text without padding, in float64."""
    of = {name: array.astype(np.float64) for name, array in weights.items()}
    x = of["model.embed_tokens.weight"][list(ids)]
    for place in range(config["num_hidden_layers"]):
        layer = f"model.layers.{place}."
        own = {name.removeprefix(layer): array for name, array in of.items() if name.startswith(layer)}
        x = x + _attended(config, own, _normed(config, x, own["input_layernorm.weight"]))
        inside = _normed(config, x, own["post_attention_layernorm.weight"])
        gate, up = inside @ own["mlp.gate_proj.weight"].T, inside @ own["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ own["mlp.down_proj.weight"].T
    states = _normed(config, x, of["model.norm.weight"])
    real = [place for place, token in enumerate(ids) if token != config.get("pad_token_id")]
    return float((states[real[-1] if real else 0] @ of["score.weight"].T)[0])


def _normed(config: Mapping[str, Any], x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight


def _attended(config: Mapping[str, Any], own: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    heads, keys, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    length = len(x)
    made = {}
    for name, count in (("q", heads), ("k", keys), ("v", keys)):
        flat = x @ own[f"self_attn.{name}_proj.weight"].T + own.get(f"self_attn.{name}_proj.bias", 0.0)
        made[name] = flat.reshape(length, count, size).transpose(1, 0, 2)
        if (norm := own.get(f"self_attn.{name}_norm.weight")) is not None:
            made[name] = _normed(config, made[name], norm)
    q, k, v = _turned(config, made["q"]), _turned(config, made["k"]), made["v"]
    k, v = (np.repeat(array, heads // keys, axis=0) for array in (k, v))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(size)
    scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    out = (shares / shares.sum(-1, keepdims=True)) @ v
    return out.transpose(1, 0, 2).reshape(length, heads * size) @ own["self_attn.o_proj.weight"].T


def _turned(config: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """Rotary positions, the halves of a head being the two coordinates (transformers' `rotate_half`)."""
    size = config["head_dim"]
    angles = np.outer(np.arange(x.shape[1]), config["rope_theta"] ** (-np.arange(0, size, 2) / size))
    first, second = x[..., : size // 2], x[..., size // 2 :]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], tokenizer: Path) -> Path:
    """A reward model in Hub layout, with the tokenizer of the model in the folder `tokenizer`."""
    folder.mkdir(parents=True)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config))
    save(folder, weights)
    return folder


def save(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    arrays = {name: mx.array(array) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})


def reward_model(
    folder: Path, tokenizer: Path, kind: str = "qwen3", seed: int = 0, labels: int = 1, **changes: Any
) -> Path:
    """A random reward model whose vocabulary is that of the tokenizer in the folder `tokenizer`."""
    tokens = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = config_of(kind, tokens, **changes)
    return write(folder, config, weights_of(config, seed, labels), tokenizer)
