"""Whether a divided model can be trained: tried on a few tokens, because mlx-lm divides models to sample from them.

What all processes hold alike must have the same gradient in all of them: that of the hidden states between layers, and
of adapters on whole layers. An architecture that leaves it in parts somewhere would train on wrong gradients.
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
"""How far gradients of one array may be apart, as a part of its largest, in float32 and in fewer bits."""


def check_divided(model: nn.Module, ranks: Ranks) -> None:
    """Raise UserError where gradients through a model that `ranks` hold together do not come out alike."""
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
            raise UserError(_said(name, model))


def _said(name: str, model: nn.Module) -> str:
    if name.endswith("lora_b"):
        layer = name.removesuffix(".lora_b").rpartition(".layers.")[2].partition(".")[2]
        return (
            f"adapter.targets: {layer} is whole in every process that holds the model (model.shard), but the gradient "
            "of its adapter comes out in parts: leave it out of adapter.targets"
        )
    return (
        f"model.shard: tensor: mlx-lm divides models of type {model.args.model_type} to sample from them, and their "
        f"gradients ({name}) come out differently in each process: such a model cannot be trained divided"
    )


def _alike(model: nn.Module, ranks: Ranks) -> dict[str, mx.array]:
    """What must be the same in all processes, by name: logits, and gradients of a function of them.

    A fresh B is zero, so of an adapter its gradient stands for both.
    """
    shards, layers = Shards(model, ranks), list(model.layers)
    tokens = mx.arange(1, TOKENS + 1)[None]

    def value(parameters: Any, probes: list[mx.array]) -> mx.array:
        model.update(parameters)
        with _probed(layers, probes):
            logits = model(tokens).astype(mx.float32)
        of_all: mx.array = (logits * mx.random.normal(logits.shape, key=mx.random.key(0))).sum()
        return of_all

    trained = model.trainable_parameters()
    try:
        width = int(talking(model).args.hidden_size)
        probes = [mx.zeros((width,), dtype_of(model)) for _ in layers]
        found, (gradient, slopes) = mx.value_and_grad(value, argnums=(0, 1))(trained, probes)
        mx.eval(found, gradient, slopes)
    except Exception as error:  # whatever the model's own code raises, or ours
        raise UserError(f"model.shard: tensor: the trial of a gradient failed: {cause(error)}") from error
    finally:
        model.update(trained)
    arrays: dict[str, mx.array] = tree_flatten(gradient, destination={})
    whole = {p: a for p, a in arrays.items() if p.endswith("lora_b") and not shards.divides(p) and p not in shards.sums}
    return {"the logits": found, **{f"before layer {i}": slope for i, slope in enumerate(slopes)}, **whole}


@contextmanager
def _probed(layers: list[nn.Module], probes: list[mx.array]) -> Iterator[None]:
    """Add a probe to the input of each layer inside the block: its gradient is that of the hidden states there."""
    of = {id(layer): probe for layer, probe in zip(layers, probes, strict=True)}

    class Probed:
        def __call__(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(x + of[id(self)], *args, **kwargs)  # type: ignore[misc]  # the layer's own

    with put_before(layers, Probed):
        yield
