"""The only module that imports mlx-lm: every other file of this package imports mlx-lm's names from here.

`__all__` lists what grpo relies on. For each name, `tests/model/test_mlxlm_contract.py` says which part of grpo needs
it, and tests that it behaves as that part expects.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import mlx.nn as nn

from grpo.backend.imports import unseen
from grpo.backend.versions import changed

try:
    with unseen("wandb"):  # mlx-lm's training code imports it, which adds half a second to the start of every command
        from mlx_lm.generate import BatchGenerator, generate_step
        from mlx_lm.models.activations import swiglu
        from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention
        from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache
        from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
        from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear
        from mlx_lm.sample_utils import make_sampler
        from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
        from mlx_lm.tuner.dora import DoRALinear
        from mlx_lm.tuner.lora import LoRALinear
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import _get_classes, load_config, load_model, load_tokenizer, quantize_model
        from mlx_lm.utils import save as save_model
except ImportError as error:
    if (error.name or "").startswith("mlx_lm."):
        raise changed("mlx-lm", error) from error
    raise  # mlx-lm is not installed, or one of its dependencies is missing

__all__ = [
    "ArraysCache",
    "BPEStreamingDetokenizer",
    "BatchGenerator",
    "CacheList",
    "DoRALinear",
    "KVCache",
    "LoRALinear",
    "MultiLinear",
    "QuantizedMultiLinear",
    "QuantizedSwitchLinear",
    "RotatingKVCache",
    "SwitchGLU",
    "SwitchLinear",
    "TokenizerWrapper",
    "create_causal_mask",
    "generate_step",
    "linear_to_lora_layers",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_prompt_cache",
    "make_sampler",
    "model_classes",
    "new_model",
    "quantize",
    "save_model",
    "scaled_dot_product_attention",
    "swiglu",
]


def model_classes(config: Mapping[str, Any]) -> tuple[type[nn.Module], Any]:
    """The model class for a `config.json`, and the class of the model's arguments, which has `from_dict`.

    Raises ValueError for an architecture that mlx-lm does not know.
    """
    made: tuple[type[nn.Module], Any] = _get_classes(dict(config))
    return made


def new_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that a `config.json` describes, with random weights from MLX's global state, not yet evaluated.

    Raises ValueError for an architecture that mlx-lm does not know.
    """
    model_class, arguments = model_classes(config)
    return model_class(arguments.from_dict(dict(config)))


def quantize(
    model: nn.Module, config: Mapping[str, Any], group_size: int, bits: int, mode: str = "affine"
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize the linear layers and embeddings of a model in place.

    Returns the model, and the config with the quantization's settings.
    """
    with redirect_stdout(StringIO()):  # mlx-lm prints the bits per weight
        model, config = quantize_model(model, dict(config), group_size, bits, mode)
    return model, dict(config)
