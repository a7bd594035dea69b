"""Checks that a divided model can be trained, by a trial on a few tokens. mlx-lm divides models only for sampling.

Arrays that are the same in all processes must have the same gradient in all of them: hidden states between layers, and
adapters on whole layers. An architecture that leaves such a gradient in parts would train on wrong gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from grpo.backend.blame import cause
from grpo.backend.ranks import Ranks
from grpo.errors import UserError
from grpo.model.head import talking
from grpo.model.quantized import dtype_of
from grpo.model.shards import Shards
from grpo.model.standins import put_before

TOKENS = 4
ALIKE = {mx.float32: 1e-4}
ROUNDED = 5e-2
"""Largest difference of an array's gradients between processes, relative to the largest gradient: `ALIKE` in float32,
`ROUNDED` in fewer bits."""


def check_divided(model: nn.Module, ranks: Ranks) -> None:
    """Raise UserError if the processes that share a model compute different gradients for it."""
    if ranks.size == 1:
        return
    former = model.training
    model.train()
    try:
        mine = ranks.checked(lambda: _alike(model, ranks))
    finally:
        model.train(former)
    most = ALIKE.get(dtype_of(model), ROUNDED)
    everyone = ranks.gather({name: np.array(array.astype(mx.float32)) for name, array in mine.items()})
    for name, array in everyone[0].items():
        gap = max(float(np.abs(theirs[name] - array).max()) for theirs in everyone)
        if not gap <= most * max(float(np.abs(array).max()), 1e-6):
            raise UserError(_message(name, model))


def _message(name: str, model: nn.Module) -> str:
    if name.endswith("lora_b"):
        layer = name.removesuffix(".lora_b").rpartition(".layers.")[2].partition(".")[2]
        return (
            f"adapter.targets: {layer} is whole in every process that shares the model (model.shard), but each process "
            "computes only a part of its adapter's gradient: remove it from adapter.targets"
        )
    return (
        f"model.shard: tensor: mlx-lm can divide models of type {model.args.model_type} for sampling, but their "
        f"gradients ({name}) differ between processes: remove model.shard, because this model cannot be trained divided"
    )


def _alike(model: nn.Module, ranks: Ranks) -> dict[str, mx.array]:
    """Arrays that must be the same in all processes, by name: a function of the logits, and its gradients.

    In a fresh adapter B is zero, so A has no gradient, and B's is checked alone.
    """
    shards, layers = Shards(model, ranks), list(model.layers)
    tokens = mx.arange(1, TOKENS + 1)[None]

    def value(parameters: Any, probes: list[mx.array]) -> mx.array:
        model.update(parameters)
        with _probed(layers, probes):
            logits = model(tokens).astype(mx.float32)
        total: mx.array = (logits * mx.random.normal(logits.shape, key=mx.random.key(0))).sum()
        return total

    trained = model.trainable_parameters()
    try:
        width = int(talking(model).args.hidden_size)
        probes = [mx.zeros((width,), dtype_of(model)) for _ in layers]
        found, (gradient, slopes) = mx.value_and_grad(value, argnums=(0, 1))(trained, probes)
        mx.eval(found, gradient, slopes)
    except Exception as error:  # the model's code, or grpo's, may raise anything
        raise UserError(f"model.shard: tensor: the trial of a gradient failed: {cause(error)}") from error
    finally:
        model.update(trained)
    arrays: dict[str, mx.array] = tree_flatten(gradient, destination={})
    whole = {p: a for p, a in arrays.items() if p.endswith("lora_b") and not shards.divides(p) and p not in shards.sums}
    return {"the logits": found, **{f"before layer {i}": slope for i, slope in enumerate(slopes)}, **whole}


@contextmanager
def _probed(layers: list[nn.Module], probes: list[mx.array]) -> Iterator[None]:
    """Add a probe to the input of each layer inside the block. The probe's gradient is that of the hidden states."""
    of = {id(layer): probe for layer, probe in zip(layers, probes, strict=True)}

    class Probed:
        def __call__(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(x + of[id(self)], *args, **kwargs)  # type: ignore[misc]  # the layer's class

    with put_before(layers, Probed):
        yield
