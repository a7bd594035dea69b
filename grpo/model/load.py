"""A model and its tokenizer from a Hub repository, a folder or a built-in maker, all through mlx-lm's loader."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from grpo.backend import cuda
from grpo.backend.device import on_gpu
from grpo.backend.hub import Repository, fetch, one_line
from grpo.backend.ranks import Ranks
from grpo.builtin import models as builtin_models
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.materialize import materialize
from grpo.model.mlxlm import TokenizerWrapper, load_model, load_tokenizer, model_classes, new_model, quantize
from grpo.model.quantized import check_computes, dtype_of, quantization, type_embeddings
from grpo.model.rotary import turn_by_stock_operations
from grpo.model.tensor import divide
from grpo.model.widehead import wide_head, widen_head

MOST_LAYERS = 2_000

TOKENIZER = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt")
"""Files of which a model has one at least."""
FETCHED = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja", "README.md"]
"""What is taken of a repository: weights, tokenizer, and the card, which says the license."""


def load(cfg: ModelConfig, ranks: Ranks | None = None) -> tuple[nn.Module, TokenizerWrapper]:
    """The model, its weights in `cfg.dtype` and frozen, and mlx-lm's tokenizer.

    `ranks` are the processes that hold it together: this one gets its part, and never has more than that and a matrix.
    Raises UserError for a model that cannot be fetched, a folder without config, tokenizer or safetensors, an
    architecture that mlx-lm does not know, and weights that do not match it.
    """
    folder = model_folder(cfg)
    check_files(cfg, folder)
    model, tokenizer = read(cfg, folder)
    divide(model, ranks or Ranks())
    _choose_head(model, cfg)
    return settled(model), tokenizer


Classes = Callable[[Mapping[str, Any]], tuple[type[nn.Module], Any]]
"""What a config's model is made of: its class, and that of its arguments."""


def read(cfg: ModelConfig, folder: Path, classes: Classes = model_classes) -> tuple[nn.Module, TokenizerWrapper]:
    """The model in a folder, in `cfg.dtype` and quantised as `cfg` says, and its tokenizer. Nothing is computed yet.

    Raises UserError for what the loaders refuse.
    """
    try:
        model, config = load_model(folder, lazy=True, get_model_classes=classes)
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever a file that is not what it should be makes the loaders raise
        raise UserError(f"model {cfg.name}: {one_line(error)} (in {folder})") from error
    _let_long_texts_pass(tokenizer)
    if (dtype := _dtype(cfg)) is not None:
        cast(model, dtype)
    if cfg.quantize is not None:
        model = _quantized(model, config, cfg)
    type_embeddings(model, dtype_of(model))
    check_computes(model, cfg.name, dtype_of(model))
    if cuda.available():
        turn_by_stock_operations(model)
    return model, tokenizer


def _let_long_texts_pass(tokenizer: TokenizerWrapper) -> None:
    """Keep transformers from its warning of a text that is longer than the model reads, "will result in indexing
    errors": who encodes a text here sees to its length."""
    known = getattr(tokenizer, "deprecation_warnings", {})
    known["sequence-length-is-longer-than-the-specified-maximum"] = True  # it warns once


def settled(model: nn.Module) -> nn.Module:
    """The model, frozen, with all its arrays computed."""
    model.freeze()
    materialize(model.parameters())
    return model


def _choose_head(model: nn.Module, cfg: ModelConfig) -> None:
    """Let logits be float32 as `cfg.head_dtype` says. Raises UserError where that is asked for and cannot be had."""
    if cfg.head_dtype == "model" or dtype_of(model) == mx.float32:
        return
    if not widen_head(model) and cfg.head_dtype == "float32":
        raise UserError(
            f"model.head_dtype: float32: {cfg.name} has no head that can be widened: no linear layer beside its body, "
            "and no embedding, decides the dtype of its logits, or MLX cannot multiply by it in float32 on this GPU. "
            "Leave the setting out to take the logits as they are"
        )


def head_note(model: nn.Module, cfg: ModelConfig) -> str | None:
    """What a person should know of the dtype of the logits, in one line; None of a float32 model's."""
    dtype = str(dtype_of(model)).removeprefix("mlx.core.")
    if dtype == "float32":
        asked = cfg.head_dtype == "float32"
        return "model.head_dtype: float32 changes nothing here: the model is float32" if asked else None
    if wide_head(model) is not None:
        return f"logits are float32, from {dtype} hidden states (model.head_dtype)"
    why = (
        "as model.head_dtype says"
        if cfg.head_dtype == "model"
        else "because no head was found that this machine multiplies by in float32"
    )
    return f"logits are rounded to {dtype}, {why}: logprobs are up to 0.08 nats off"


def check_files(cfg: ModelConfig, folder: Path) -> None:
    """Raise UserError for a folder without what a model needs. (Without a tokenizer an empty one would be made.)"""
    if not (folder / "config.json").is_file():
        raise UserError(f"model {cfg.name}: no config.json in {folder}: not a model folder in Hub layout")
    try:
        check_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"model {cfg.name}: config.json in {folder} is not JSON: {one_line(error)}") from None
    if not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"model {cfg.name}: no model*.safetensors in {folder}; weights in other formats (.bin, GGUF) are not read: "
            "look for a copy of it in safetensors"
        )
    if not any(found for pattern in TOKENIZER for found in folder.glob(pattern)):
        raise UserError(f"model {cfg.name}: no tokenizer ({', '.join(TOKENIZER)}) in {folder}")


def check_config(config: Any) -> None:
    """Raise UserError for a model's config that is no mapping, or has more layers than any model: they would be made
    before the weights are looked at."""
    if not isinstance(config, Mapping):
        raise UserError("config.json: expected keys and values")
    for part in (config, *(inner for inner in config.values() if isinstance(inner, Mapping))):
        for name, value in part.items():
            if "layer" in name and isinstance(value, int | float) and value > MOST_LAYERS:
                raise UserError(
                    f"config.json: {name} is {value:.6g}, and no model has more than {MOST_LAYERS:,} layers"
                )


def _quantized(model: nn.Module, config: dict[str, Any], cfg: ModelConfig) -> nn.Module:
    assert cfg.quantize is not None
    if "quantization" in config:
        raise UserError(f"model.quantize: {cfg.name} is quantised already, to {config['quantization']['bits']} bits")
    return quantize(model, config, **quantization(cfg.quantize).config)[0]


def is_local(cfg: ModelConfig) -> bool:
    """Whether the model is to be had without the Hub."""
    return cfg.name.startswith("builtin:") or Path(cfg.name).expanduser().is_dir()


def model_folder(cfg: ModelConfig) -> Path:
    """The folder with the model's files: made, found, or fetched from the Hub."""
    if cfg.name in builtin_models.NAMES:
        return builtin_models.folder(cfg.name, new_model)
    if cfg.name.startswith("builtin:"):
        raise UserError(f"model {cfg.name}: no such built-in; there is {', '.join(builtin_models.NAMES)}")
    folder = Path(cfg.name).expanduser()
    if folder.is_dir():
        if cfg.revision is not None:
            raise UserError(f"model.revision is for Hub repositories; {cfg.name} is a folder")
        return folder
    if looks_like_path(cfg.name):
        raise UserError(f"model {cfg.name}: there is no such folder{similar(folder)}")
    return _fetch(cfg)


def looks_like_path(name: str) -> bool:
    """Whether a name is rather meant here than on the Hub: `./a`, `a/b/c`, `a/`, what is below `runs`, and `a/b` where
    there is a folder `a`."""
    path = Path(name).expanduser()
    shaped = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return shaped or path.exists() or path.parts[:1] == ("runs",) or (path.parent != Path() and path.parent.is_dir())


def similar(folder: Path) -> str:
    """`. Did you mean …?` with the most similar name beside a folder that is not there; nothing if none is similar."""
    beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, beside, n=1)
    return f". Did you mean {folder.parent / close[0]}?" if close else ""


def _fetch(cfg: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    def download(cached: bool) -> str:
        return snapshot_download(cfg.name, revision=cfg.revision, allow_patterns=FETCHED, local_files_only=cached)

    return Path(fetch(Repository("model", cfg.name, cfg.revision), download))


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Make the weights of this dtype, but for those that the model wants to keep as they are (biases of routers), and
    scales of whole matrices, which MLX takes in float32 alone."""
    wanted = getattr(model, "cast_predicate", lambda _path: True)

    def one(path: str, array: mx.array) -> mx.array:
        kept = path.endswith(".global_scale") or not wanted(path)
        return array if kept or not mx.issubdtype(array.dtype, mx.floating) else array.astype(dtype)

    model.update(tree_map_with_path(one, model.parameters()))


def _dtype(cfg: ModelConfig) -> mx.Dtype | None:
    if cfg.dtype != "auto":
        dtype: mx.Dtype = getattr(mx, cfg.dtype)
        return dtype
    return None if on_gpu() else mx.float32
