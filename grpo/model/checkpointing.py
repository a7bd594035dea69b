"""Gradient checkpointing: what is inside is computed again in the backward pass instead of being kept.

`mx.checkpoint` gives gradients to its arguments alone; whatever else the function reads (trainable parameters, the
keys and values of a cache) would lose its gradient without a word, and so is handed over explicitly here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.model.attending import as_now
from grpo.model.dropout import dropout_key, dropping
from grpo.model.offloading import Checkpoint
from grpo.model.rowwise import RowWise
from grpo.model.standins import put_before

CheckpointOf = Callable[[nn.Module], Checkpoint]
"""What checkpoints a layer."""


def always(checkpoint: Checkpoint) -> CheckpointOf:
    """The same for every layer."""
    return lambda _: checkpoint


PLAIN = always(mx.checkpoint)


def checkpointed(
    module: nn.Module, parameters: Any, function: Callable[..., Any], checkpoint: Checkpoint = mx.checkpoint
) -> Callable[..., Any]:
    """`function` under `mx.checkpoint`, with `parameters` (a tree of `module`'s) as inputs too.

    Arguments must be arrays, or trees of them, that can have a gradient. `checkpoint` takes the place of MLX's own.
    """

    def inner(given: Any, *arrays: Any) -> Any:
        module.update(given)
        try:
            return function(*arrays)
        finally:
            module.update(parameters)

    call = checkpoint(inner)
    return lambda *arrays: call(parameters, *arrays)


@contextmanager
def checkpointed_layers(
    layers: Sequence[nn.Module], on: bool | int, row_wise: RowWise, checkpoint_of: CheckpointOf = PLAIN
) -> Iterator[None]:
    """Inside the block these layers are checkpointed; outside, in generation, they are what they were.

    `on` is True (all), False (none), or how many of them, from the first: the backward pass comes to the last layers
    first, so what those keep is gone when a layer before them is computed again. `row_wise` parts go by tiles of
    tokens. `checkpoint_of` a layer takes the place of MLX's.
    """
    layers = layers if on is True else layers[: int(on)]
    own = {"row_wise": row_wise, "checkpoint_of": staticmethod(checkpoint_of)}
    with put_before(layers, _Checkpointed, own):
        yield


class _Checkpointed:
    """Put before a layer's own class: the same layer, its inside computed again in the backward pass."""

    row_wise: RowWise
    checkpoint_of: CheckpointOf

    def __call__(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        plain = super().__call__  # type: ignore[misc]  # the layer's own
        cache = next((a for a in (*args, *kwargs.values()) if hasattr(a, "bind")), None)
        key = dropout_key()  # the backward pass comes when another is set, or none
        attention, in_tiles = as_now(), self.row_wise.inside
        inside = next((a.inside for a in (*args, *kwargs.values()) if hasattr(a, "inside")), nullcontext)  # and so here

        def call(x: mx.array, inputs: list[mx.array]) -> Any:
            if cache is not None:
                cache.bind(inputs)
            with dropping(key), attention(), inside(self), in_tiles(self):
                out = plain(x, *args, **kwargs)
            return out, cache.outputs() if cache is not None else []

        inputs = cache.inputs() if cache is not None else []
        out, left = checkpointed(self, self.trainable_parameters(), call, self.checkpoint_of(self))(x, inputs)
        if cache is not None:
            cache.bind(inputs)
            cache.keep(left)
        return out
