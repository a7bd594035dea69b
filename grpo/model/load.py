"""A model and its tokenizer from a Hub repository, a folder or a built-in maker, all through mlx-lm's loader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.device import on_gpu
from grpo.builtin import models as builtin_models
from grpo.config import ModelConfig
from grpo.errors import UserError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

WEIGHTS_AND_TOKENIZER = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


def load(cfg: ModelConfig) -> tuple[nn.Module, TokenizerWrapper]:
    """The model, its weights in `cfg.dtype` and frozen, and mlx-lm's tokenizer.

    Raises UserError for a model that cannot be fetched, a folder without a config, an architecture that mlx-lm
    does not know, and weights that do not match it.
    """
    from mlx_lm.utils import load_model, load_tokenizer

    folder = model_folder(cfg)
    if not (folder / "config.json").is_file():
        raise UserError(f"model {cfg.name}: no config.json in {folder}: not a model folder in Hub layout")
    try:
        model, config = load_model(folder, lazy=True)
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"model {cfg.name}: {_shorten(error)} (in {folder})") from error
    model.set_dtype(_dtype(cfg)) if _dtype(cfg) is not None else None
    model.freeze()
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:  # weights are read when evaluated: a truncated file shows here
        raise UserError(f"model {cfg.name}: weights cannot be read: {_shorten(error)}") from error
    return model, tokenizer


def model_folder(cfg: ModelConfig) -> Path:
    """The folder with the model's files: made, found, or fetched from the Hub."""
    if cfg.name in builtin_models.NAMES:
        return builtin_models.folder(cfg.name)
    if cfg.name.startswith("builtin:"):
        raise UserError(f"model {cfg.name}: no such built-in; there is {', '.join(builtin_models.NAMES)}")
    folder = Path(cfg.name).expanduser()
    if folder.is_dir():
        return folder
    if cfg.name.startswith((".", "/", "~")) or cfg.name.count("/") > 1:
        raise UserError(f"model {cfg.name}: there is no such folder")
    return _fetch(cfg)


def _fetch(cfg: ModelConfig) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(cfg.name, revision=cfg.revision, allow_patterns=WEIGHTS_AND_TOKENIZER))
    except HFValidationError as error:
        raise UserError(f"model {cfg.name}: neither a folder nor a Hub repository's name: {error}") from None
    except (HfHubHTTPError, OSError) as error:  # no network, missing, gated, not in the cache
        why = _shorten(error)
        raise UserError(f"model {cfg.name}: could not be fetched from {constants.ENDPOINT}: {why}") from error


def _dtype(cfg: ModelConfig) -> mx.Dtype | None:
    if cfg.dtype != "auto":
        dtype: mx.Dtype = getattr(mx, cfg.dtype)
        return dtype
    return None if on_gpu() else mx.float32


def _shorten(error: BaseException) -> str:
    """The first line of an error, or of the first one that says something."""
    text: Any = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return f"{' '.join(lines)[:300]}"
