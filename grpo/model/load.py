"""A model and its tokenizer from a Hub repository, a folder or a built-in maker, all through mlx-lm's loader."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.device import on_gpu
from grpo.backend.hub import Repository, fetch, one_line
from grpo.builtin import models as builtin_models
from grpo.config import ModelConfig
from grpo.errors import UserError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

QUANTIZED_GROUP = 64
"""Weights that share a scale and an offset."""

TOKENIZER = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt")
"""Files of which a model has one at least."""
WEIGHTS_AND_TOKENIZER = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


def load(cfg: ModelConfig) -> tuple[nn.Module, TokenizerWrapper]:
    """The model, its weights in `cfg.dtype` and frozen, and mlx-lm's tokenizer.

    Raises UserError for a model that cannot be fetched, a folder without config, tokenizer or safetensors, an
    architecture that mlx-lm does not know, and weights that do not match it.
    """
    from mlx_lm.utils import load_model, load_tokenizer

    folder = model_folder(cfg)
    _check_files(cfg, folder)
    try:
        model, config = load_model(folder, lazy=True)
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever a file that is not what it should be makes the loaders raise
        raise UserError(f"model {cfg.name}: {one_line(error)} (in {folder})") from error
    if (dtype := _dtype(cfg)) is not None:
        model.set_dtype(dtype)
    if cfg.quantize is not None:
        model = _quantized(model, config, cfg)
    model.freeze()
    mx.eval(model.parameters())
    return model, tokenizer


def _check_files(cfg: ModelConfig, folder: Path) -> None:
    """Raise UserError for a folder without what a model needs. (Without a tokenizer an empty one would be made.)"""
    if not (folder / "config.json").is_file():
        raise UserError(f"model {cfg.name}: no config.json in {folder}: not a model folder in Hub layout")
    if not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"model {cfg.name}: no model*.safetensors in {folder}; weights in other formats (.bin, GGUF) are not read: "
            "look for a copy of it in safetensors"
        )
    if not any(found for pattern in TOKENIZER for found in folder.glob(pattern)):
        raise UserError(f"model {cfg.name}: no tokenizer ({', '.join(TOKENIZER)}) in {folder}")


def _quantized(model: nn.Module, config: dict[str, Any], cfg: ModelConfig) -> nn.Module:
    from mlx_lm.utils import quantize_model

    assert cfg.quantize is not None
    if "quantization" in config:
        raise UserError(f"model.quantize: {cfg.name} is quantised already, to {config['quantization']['bits']} bits")
    with redirect_stdout(StringIO()):  # it reports bits per weight
        quantized: nn.Module = quantize_model(model, config, QUANTIZED_GROUP, cfg.quantize)[0]
    return quantized


def is_local(cfg: ModelConfig) -> bool:
    """Whether the model is to be had without the Hub."""
    return cfg.name.startswith("builtin:") or Path(cfg.name).expanduser().is_dir()


def model_folder(cfg: ModelConfig) -> Path:
    """The folder with the model's files: made, found, or fetched from the Hub."""
    if cfg.name in builtin_models.NAMES:
        return builtin_models.folder(cfg.name)
    if cfg.name.startswith("builtin:"):
        raise UserError(f"model {cfg.name}: no such built-in; there is {', '.join(builtin_models.NAMES)}")
    folder = Path(cfg.name).expanduser()
    if folder.is_dir():
        if cfg.revision is not None:
            raise UserError(f"model.revision is for Hub repositories; {cfg.name} is a folder")
        return folder
    if cfg.name.startswith((".", "/", "~")) or cfg.name.count("/") > 1 or _below_a_folder(folder):
        raise UserError(f"model {cfg.name}: there is no such folder")
    return _fetch(cfg)


def _below_a_folder(path: Path) -> bool:
    """Whether `a/b` is rather meant here than on the Hub, because there is a folder `a`."""
    return path.parent != Path() and path.parent.is_dir()


def _fetch(cfg: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    def download(cached: bool) -> str:
        return snapshot_download(
            cfg.name, revision=cfg.revision, allow_patterns=WEIGHTS_AND_TOKENIZER, local_files_only=cached
        )

    return Path(fetch(Repository("model", cfg.name, cfg.revision), download))


def _dtype(cfg: ModelConfig) -> mx.Dtype | None:
    if cfg.dtype != "auto":
        dtype: mx.Dtype = getattr(mx, cfg.dtype)
        return dtype
    return None if on_gpu() else mx.float32
