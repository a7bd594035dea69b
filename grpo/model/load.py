"""Loads a model and its tokenizer, with mlx-lm's loader, from a Hub repository, a folder or a built-in model."""

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
"""Patterns of tokenizer files. A model has at least one of them."""
FETCHED = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja", "README.md"]
"""Files to download from a repository: weights, tokenizer, and the model card, which states the license."""


def load(cfg: ModelConfig, ranks: Ranks | None = None) -> tuple[nn.Module, TokenizerWrapper]:
    """The frozen model, with weights in `cfg.dtype`, and mlx-lm's tokenizer.

    `ranks` are the processes that share the model: this process gets its part, and never holds more than its part and
    one matrix. Raises UserError for a model that cannot be downloaded, a folder without config, tokenizer or
    safetensors, an architecture that mlx-lm does not know, and weights that do not match the architecture.
    """
    folder = model_folder(cfg)
    check_files(cfg, folder)
    model, tokenizer = read(cfg, folder)
    divide(model, ranks or Ranks())
    _choose_head(model, cfg)
    return settled(model), tokenizer


Classes = Callable[[Mapping[str, Any]], tuple[type[nn.Module], Any]]
"""Returns the model class and the arguments class for a config."""


def read(cfg: ModelConfig, folder: Path, classes: Classes = model_classes) -> tuple[nn.Module, TokenizerWrapper]:
    """The model in a folder, in `cfg.dtype` and quantized as `cfg` says, and its tokenizer. Nothing is evaluated yet.

    Raises UserError if the loaders raise.
    """
    try:
        model, config = load_model(folder, lazy=True, get_model_classes=classes)
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # a malformed file can make the loaders raise anything
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
    """Silence transformers' warning about texts that are longer than the model's limit ("will result in indexing
    errors"): grpo checks lengths itself."""
    shown = getattr(tokenizer, "deprecation_warnings", {})
    shown["sequence-length-is-longer-than-the-specified-maximum"] = True  # transformers warns only once


def settled(model: nn.Module) -> nn.Module:
    """Freeze the model and evaluate its arrays. Returns the model."""
    model.freeze()
    materialize(model.parameters())
    return model


def _choose_head(model: nn.Module, cfg: ModelConfig) -> None:
    """Make logits float32 if `cfg.head_dtype` says so. Raises UserError if float32 is required but impossible."""
    if cfg.head_dtype == "model" or dtype_of(model) == mx.float32:
        return
    if not widen_head(model) and cfg.head_dtype == "float32":
        raise UserError(
            f"model.head_dtype: float32: the head of {cfg.name} cannot compute in float32: either no linear layer "
            "outside its body, and no embedding, determines the dtype of its logits, or MLX has no float32 product for "
            "it on this GPU. Remove the setting to use the model's own logits"
        )


def head_note(model: nn.Module, cfg: ModelConfig) -> str | None:
    """One line for the user about the dtype of the logits; None if nothing is worth saying."""
    dtype = str(dtype_of(model)).removeprefix("mlx.core.")
    if dtype == "float32":
        is_set = cfg.head_dtype == "float32"
        return "model.head_dtype: float32 changes nothing here: the model is float32" if is_set else None
    if wide_head(model) is not None:
        return f"logits are float32, from {dtype} hidden states (model.head_dtype)"
    why = (
        "as model.head_dtype says"
        if cfg.head_dtype == "model"
        else "because grpo found no head that this machine can multiply by in float32"
    )
    return f"logits are rounded to {dtype}, {why}: logprobs are up to 0.08 nats off"


def check_files(cfg: ModelConfig, folder: Path) -> None:
    """Raise UserError for a folder that lacks a file. (Without tokenizer files, transformers creates an empty one.)"""
    if not (folder / "config.json").is_file():
        raise UserError(f"model {cfg.name}: no config.json in {folder}: not a model folder in Hub layout")
    try:
        check_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"model {cfg.name}: config.json in {folder} is not JSON: {one_line(error)}") from None
    if not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"model {cfg.name}: no model*.safetensors in {folder}; grpo does not read other formats (.bin, GGUF): use "
            "a copy of the model in safetensors"
        )
    if not any(found for pattern in TOKENIZER for found in folder.glob(pattern)):
        raise UserError(f"model {cfg.name}: no tokenizer ({', '.join(TOKENIZER)}) in {folder}")


def check_config(config: Any) -> None:
    """Raise UserError for a config that is not a mapping, or that has more layers than any model. mlx-lm would create
    all these layers before it looks at the weights."""
    if not isinstance(config, Mapping):
        raise UserError("config.json: expected keys and values")
    for part in (config, *(inner for inner in config.values() if isinstance(inner, Mapping))):
        for name, value in part.items():
            if "layer" in name and isinstance(value, int | float) and value > MOST_LAYERS:
                raise UserError(
                    f"config.json: {name} is {value:.6g}, but no model has more than {MOST_LAYERS:,} layers"
                )


def _quantized(model: nn.Module, config: dict[str, Any], cfg: ModelConfig) -> nn.Module:
    assert cfg.quantize is not None
    if "quantization" in config:
        raise UserError(f"model.quantize: {cfg.name} is already quantized, to {config['quantization']['bits']} bits")
    return quantize(model, config, **quantization(cfg.quantize).config)[0]


def is_local(cfg: ModelConfig) -> bool:
    """Whether the model is available without the Hub."""
    return cfg.name.startswith("builtin:") or Path(cfg.name).expanduser().is_dir()


def model_folder(cfg: ModelConfig) -> Path:
    """The folder with the model's files: created for a built-in model, found, or downloaded from the Hub."""
    if cfg.name in builtin_models.NAMES:
        return builtin_models.folder(cfg.name, new_model)
    if cfg.name.startswith("builtin:"):
        raise UserError(f"model {cfg.name}: no such built-in model; choose one of {', '.join(builtin_models.NAMES)}")
    folder = Path(cfg.name).expanduser()
    if folder.is_dir():
        if cfg.revision is not None:
            raise UserError(f"model.revision is for Hub repositories; {cfg.name} is a folder")
        return folder
    if looks_like_path(cfg.name):
        raise UserError(f"model {cfg.name}: there is no such folder{similar(folder)}")
    return _fetch(cfg)


def looks_like_path(name: str) -> bool:
    """Whether a name means a local path and not a Hub repository: `./a`, `a/b/c`, `a/`, a path below `runs`, and `a/b`
    if there is a folder `a`."""
    path = Path(name).expanduser()
    shaped = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    return shaped or path.exists() or path.parts[:1] == ("runs",) or (path.parent != Path() and path.parent.is_dir())


def similar(folder: Path) -> str:
    """`. Did you mean …?` with the most similar sibling of a missing folder; empty if none is similar."""
    siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, siblings, n=1)
    return f". Did you mean {folder.parent / close[0]}?" if close else ""


def _fetch(cfg: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    def download(cached: bool) -> str:
        return snapshot_download(cfg.name, revision=cfg.revision, allow_patterns=FETCHED, local_files_only=cached)

    return Path(fetch(Repository("model", cfg.name, cfg.revision), download))


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast the weights to this dtype, except those that the model excludes (biases of routers) and global scales, which
    MLX requires in float32."""
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
