"""A model's sizes from its config alone, without weights and without evaluating anything.

mlx-lm builds the model, and MLX evaluates arrays lazily: so every architecture that mlx-lm knows is counted exactly,
with its biases, experts and quantization, in milliseconds and without memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.hub import one_line
from grpo.backend.ranks import Ranks
from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.model.adapters import LINEAR, make_trainable
from grpo.model.costs import Costs, Product
from grpo.model.load import check_config
from grpo.model.mlxlm import new_model
from grpo.model.stored import Stored, stored
from grpo.model.tensor import divide

USED_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")
"""Config keys for the number of experts per token, which differ by architecture."""


def costs_of_config(
    config: Mapping[str, Any], adapter: AdapterConfig | None = None, dtype: mx.Dtype | None = None
) -> Costs:
    """The costs of the model that a `config.json` describes, with `adapter` if given.

    `dtype` (default: the config's, or bfloat16) is the dtype of weights that are not quantized. Raises UserError for an
    architecture that mlx-lm does not know.
    """
    return costs_of(outline(config, adapter, dtype))


def costs_of(model: nn.Module) -> Costs:
    """The costs of a model with its present adapter, quantization and dtype. Evaluates nothing.

    Raises UserError for an architecture whose config stores its sizes under unknown names.
    """
    arrays = tree_flatten(model.parameters())
    modules = dict(model.named_modules())
    found = {path: _products(model, module) for path, module in modules.items()}
    embedding = next(_matrix(model, m) for m in modules.values() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding))
    (head,) = next((found.pop(path) for path in list(found) if path.endswith("lm_head")), [embedding])
    products = tuple(product for several in found.values() for product in several)
    matrices = [*products, head] + ([embedding] if head is not embedding else [])
    weight_bytes = sum(a.nbytes for _, a in arrays)
    heads = _argument(model, "num_attention_heads")
    return Costs(
        parameters=sum(map(_numbers, model.modules())),
        trained=sum(a.size for _, a in tree_flatten(model.trainable_parameters())),
        weight_bytes=weight_bytes,
        products=products,
        head=head,
        other_bytes=weight_bytes - sum(matrix.nbytes for matrix in matrices),
        depth=len(model.layers),
        hidden=embedding.inputs,
        heads=heads,
        kv_heads=_argument(model, "num_key_value_heads", default=heads),
        head_dim=_argument(model, "head_dim", default=embedding.inputs // heads),
        itemsize=next((a.dtype.size for path, a in arrays if "norm" in path), 4),  # norms are never quantized
    )


def outline(
    config: Mapping[str, Any],
    adapter: AdapterConfig | None,
    dtype: mx.Dtype | None,
    make: Callable[[Mapping[str, Any]], nn.Module] = new_model,
    ranks: Ranks | None = None,
) -> nn.Module:
    """The model of a config with arrays that are never evaluated: only their shapes and dtypes have a meaning.

    `make` builds the model from the config. `ranks` are the processes that share the model; they need not exist. The
    result is one process's part.
    """
    check_config(config)
    try:
        model = make(config)
    except Exception as error:  # a malformed config can make mlx-lm's code raise anything
        raise UserError(f"config.json: mlx-lm cannot build a model from it: {one_line(error)}") from error
    model.set_dtype(dtype or _dtype_of(config))
    if (how := stored(config)) is not None:
        _quantize(model, how)
    divide(model, ranks or Ranks())
    model.freeze()
    if adapter is not None:
        make_trainable(model, adapter, mx.random.key(0), ranks)
    return model


def _quantize(model: nn.Module, how: Stored) -> None:
    """Quantize as mlx-lm's loader does: with a path's own settings if it has any, or else with the common ones."""
    settings = how.settings
    size = settings["group_size"]

    def chosen(path: str, module: nn.Module) -> Any:
        own = settings.get(path)
        if own is not None:
            return own
        kept = how.keeps(path) or (isinstance(module, nn.Embedding) and not how.embeddings)
        return not kept and hasattr(module, "to_quantized") and module.weight.shape[-1] % size == 0

    nn.quantize(model, size, settings["bits"], mode=settings.get("mode", "affine"), class_predicate=chosen)


def _dtype_of(config: Mapping[str, Any]) -> mx.Dtype:
    inner = config.get("text_config", {})
    name = next((c[key] for c in (config, inner) for key in ("dtype", "torch_dtype") if c.get(key)), "bfloat16")
    dtype: mx.Dtype = getattr(mx, name)
    return dtype


def _products(model: nn.Module, module: nn.Module) -> list[Product]:
    """The matrices of this module alone. The base layer inside an adapter's layer is a separate module."""
    if isinstance(module, LINEAR):
        return [_matrix(model, module)]
    if "lora_a" not in module:
        return []
    a, b = module["lora_a"], module["lora_b"]
    if b.ndim == 2:
        (inputs, rank), outputs = a.shape, b.shape[1]
        return [Product(inputs, rank, a.nbytes, True), Product(rank, outputs, b.nbytes, True)]
    experts, outputs, rank = b.shape
    met = experts, used_experts(model)
    return [Product(a.shape[-1], rank, a.nbytes, True, *met), Product(rank, outputs, b.nbytes, True, *met)]


def _matrix(model: nn.Module, module: nn.Module) -> Product:
    """The weight matrix of a linear layer or an embedding."""
    *experts, outputs, inputs = _shape(module)
    nbytes = sum(module[name].nbytes for name in ("weight", "scales", "biases") if module.get(name) is not None)
    trains = "weight" in module.trainable_parameters()
    if not experts:
        return Product(inputs, outputs, nbytes, trains)
    return Product(inputs, outputs, nbytes, trains, experts[0], used_experts(model))


def _shape(module: nn.Module) -> tuple[int, ...]:
    """The unpacked shape of a layer's matrix. A quantized matrix packs several numbers into a word."""
    shape: tuple[int, ...] = module["weight"].shape
    return (*shape[:-1], module["scales"].shape[-1] * module.group_size) if "scales" in module else shape


def _numbers(module: nn.Module) -> int:
    """Number of parameters of this module alone. A quantized matrix counts with its unpacked shape."""
    own = {name: a for name, a in module.items() if isinstance(a, mx.array) and not name.startswith("_")}
    if "scales" in own:
        return math.prod(_shape(module)) + (own["bias"].size if "bias" in own else 0)
    return sum(a.size for a in own.values())


def used_experts(model: nn.Module, default: int | None = None) -> int:
    """Number of experts per token. Raises UserError if the config does not say it and there is no `default`."""
    return _argument(model, *USED_EXPERTS, default=default)


def _argument(model: nn.Module, *names: str, default: int | None = None) -> int:
    """A size from the model's config, or from its `text_config`."""
    inner = getattr(model.args, "text_config", None) or {}
    for name in names:
        for value in (getattr(model.args, name, None), inner.get(name)):
            if value is not None:
                return int(value)
    if default is None:
        raise UserError(
            f"{model.args.model_type}: grpo cannot compute this model's costs, because its config has no "
            f"{' or '.join(names)}"
        )
    return default
